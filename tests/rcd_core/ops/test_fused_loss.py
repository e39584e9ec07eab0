"""The fused head and loss against the plain ones: value, both gradients, chunks, autocast, tied heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rcd_core.ops.fused_loss import weighted_cross_entropy


def problem(n: int = 37, d: int = 16, v: int = 101) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, head = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    return hidden, head, torch.randint(0, v, (n,)), torch.rand(n) + 0.1


def plain(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return (nn.functional.cross_entropy((hidden @ head.T).float(), labels, reduction="none") * weights).sum()


@pytest.mark.parametrize("rows", [None, 1, 8, 37, 100])
def test_value_and_gradients(rows: int | None) -> None:
    hidden, head, labels, weights = problem()
    want = plain(hidden, head, labels, weights)
    wanted = torch.autograd.grad(3 * want, (hidden, head))
    loss, losses = weighted_cross_entropy(hidden, head, labels, weights, rows)
    found = torch.autograd.grad(3 * loss, (hidden, head))
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close((losses * weights).sum(), want)
    assert not losses.requires_grad
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_tied_head_gets_both_gradients() -> None:
    hidden, head, labels, weights = problem()
    inputs = head[labels] * 2 + hidden
    want = torch.autograd.grad(plain(inputs, head, labels, weights), head, retain_graph=True)[0]
    found = torch.autograd.grad(weighted_cross_entropy(inputs, head, labels, weights)[0], head)[0]
    torch.testing.assert_close(found, want, atol=1e-5 * float(want.abs().max()), rtol=1e-4)


def test_only_needed_gradients_are_computed() -> None:
    hidden, head, labels, weights = problem()
    loss, _ = weighted_cross_entropy(hidden, head.detach(), labels, weights)
    assert loss.grad_fn is not None and loss.grad_fn.saved_tensors[1] is None  # type: ignore[attr-defined]
    with torch.no_grad():
        assert not weighted_cross_entropy(hidden, head, labels, weights)[0].requires_grad
    empty = weighted_cross_entropy(hidden[:0], head, labels[:0], weights[:0])[0]
    assert empty == 0
    empty.backward()
    assert head.grad is not None and not head.grad.any()


def test_bfloat16_is_as_good_as_plain_bfloat16() -> None:
    """Under autocast with fp32 weights: the error against fp32 is no larger than that of the plain computation."""
    hidden, head, labels, weights = problem(200, 64, 1000)
    exact = torch.autograd.grad(plain(hidden, head, labels, weights), (hidden, head))
    with torch.autocast("cpu", torch.bfloat16):
        rough = plain(hidden, head, labels, weights)
        ours, _ = weighted_cross_entropy(hidden, head, labels, weights, 64)
    assert ours.dtype == torch.float32
    roughly = torch.autograd.grad(rough, (hidden, head))
    found = torch.autograd.grad(ours, (hidden, head))
    for e, r, f in zip(exact, roughly, found, strict=True):
        assert f.dtype == torch.float32
        assert (f - e).norm() <= 1.1 * (r - e).norm() + 1e-6
