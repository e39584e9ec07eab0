"""The input embeddings with residuals, values and gradients, against the equations written out."""

from __future__ import annotations

import pytest
import torch

from rcd_core import inject_residual
from rcd_core.decode_settings import AlphaRule
from rcd_core.dense_signals import DenseSignals
from rcd_core.ops.residual_embedding import residual_embedding
from rcd_core.signals import ReferenceSignals, residual_state, sparse_residual

V, D = 23, 6


def inputs(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids (2, 7) with the mask's id V - 1 twice over, which of them are masked, logits (N, V), a table."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V - 1, (2, 7), generator=generator)
    masked = torch.zeros(14, dtype=torch.bool)
    masked[torch.randperm(14, generator=generator)[:count]] = True
    masked = masked.view(2, 7)
    logits = torch.randn(count, V, generator=generator, dtype=torch.float64) * 3
    table = torch.randn(V, D, generator=generator, dtype=torch.float64)
    return torch.where(masked, V - 1, ids), masked, logits, table


@pytest.mark.parametrize("rule", ["normalized_entropy", "one", "top1"])
@pytest.mark.parametrize("count", [0, 1, 9, 14])
@pytest.mark.parametrize("mass", [None, 0.8])
def test_it_is_lookup_soft_embedding_and_injection_with_their_gradients(
    rule: AlphaRule, count: int, mass: float | None
) -> None:
    ids, masked, logits, values = inputs(count)
    signals = ReferenceSignals.from_logits(logits.float(), 4, mass)
    upstream = torch.randn(2, 7, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    table = values.clone().requires_grad_(True)
    embeds = table[ids]
    alpha, delta = residual_state(signals, table, rule, None)
    want = inject_residual(embeds, masked, alpha, delta, embeds[masked])
    want.backward(upstream)

    low = values.float().requires_grad_(True)
    found = residual_embedding(ids, masked, low, sparse_residual(signals, V, rule, None))
    found.backward(upstream.float())
    torch.testing.assert_close(found.double(), want.detach(), atol=2e-6, rtol=1e-5)
    assert table.grad is not None and low.grad is not None
    torch.testing.assert_close(low.grad.double(), table.grad, atol=1e-5, rtol=1e-5)


def test_without_alpha_it_is_the_plain_lookup_bit_for_bit() -> None:
    ids, masked, logits, values = inputs(9)
    sparse = sparse_residual(ReferenceSignals.from_logits(logits.float(), 4), V, "one", None).scaled(torch.zeros(9))
    for dtype in (torch.float32, torch.bfloat16):
        table = values.to(dtype).requires_grad_(True)
        plain = values.to(dtype).requires_grad_(True)
        found, want = residual_embedding(ids, masked, table, sparse), plain[ids]
        assert torch.equal(found, want) and found.dtype == dtype
        found.sum().backward()
        want.sum().backward()
        assert table.grad is not None and plain.grad is not None
        assert torch.equal(table.grad, plain.grad)


def test_all_entries_kept_is_the_dense_residual() -> None:
    ids, masked, logits, values = inputs(9)
    table = values.float()
    sparse = sparse_residual(ReferenceSignals.from_logits(logits.float(), V), V, "normalized_entropy", None)
    alpha, delta = residual_state(DenseSignals(logits.float()), table, "normalized_entropy", None)
    want = inject_residual(table[ids], masked, alpha, delta, table[V - 1])
    torch.testing.assert_close(residual_embedding(ids, masked, table, sparse), want, atol=5e-3, rtol=5e-3)  # fp16
