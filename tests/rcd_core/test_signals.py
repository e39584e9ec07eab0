"""ReferenceSignals: fidelity, travel, and the refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcd_core import ReferenceSignals, UserError
from rcd_core.residual import entropy
from rcd_core.signals import DenseSignals, residual_state

NUM, VOCAB, WIDTH = 7, 50, 12


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(NUM, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1)) + 0.5


def test_fields_and_dtypes(logits: torch.Tensor) -> None:
    s = ReferenceSignals.from_logits(logits.to(torch.bfloat16), k=8)
    assert (s.topk_ids.dtype, s.topk_logprobs.dtype) == (torch.int32, torch.float16)
    assert (s.entropy.dtype, s.tail_mass.dtype) == (torch.float32, torch.float32)
    assert s.topk_ids.shape == s.topk_logprobs.shape == (NUM, 8)


def test_whole_distribution_is_accounted_for(logits: torch.Tensor) -> None:
    s = ReferenceSignals.from_logits(logits, k=8)
    mass = s.topk_logprobs.float().exp().sum(1) + s.tail_mass
    torch.testing.assert_close(mass, torch.ones(NUM), atol=2e-3, rtol=0)  # fp16 log-probabilities
    torch.testing.assert_close(s.entropy, entropy(logits))
    torch.testing.assert_close(s.alpha(VOCAB), entropy(logits) / math.log(VOCAB))


def test_all_kept_equals_dense(logits: torch.Tensor, table: torch.Tensor) -> None:
    s = ReferenceSignals.from_logits(logits, k=VOCAB)
    assert s.tail_mass.max() == 0
    dense = DenseSignals(logits).soft_embedding(table)
    torch.testing.assert_close(s.soft_embedding(table), dense, atol=4e-3, rtol=0)


def test_tail_goes_on_the_mean_of_what_is_left(logits: torch.Tensor, table: torch.Tensor) -> None:
    """By hand for one position; and the gradient reaches ids that were not kept."""
    s = ReferenceSignals.from_logits(logits, k=4)
    weight = table.clone().requires_grad_()
    delta = s.soft_embedding(weight)
    ids = s.topk_ids[0].long()
    left = [i for i in range(VOCAB) if i not in ids.tolist()]
    want = (s.topk_logprobs[0].float().exp()[:, None] * table[ids]).sum(0) + s.tail_mass[0] * table[left].mean(0)
    torch.testing.assert_close(delta[0], want, atol=1e-5, rtol=1e-5)
    delta[0].sum().backward()
    assert weight.grad is not None and (weight.grad[left[0]] > 0).all()


def test_more_entries_are_more_faithful(logits: torch.Tensor, table: torch.Tensor) -> None:
    dense = DenseSignals(logits).soft_embedding(table)
    errors = [(ReferenceSignals.from_logits(logits, k=k).soft_embedding(table) - dense).norm() for k in (1, 4, 16, 50)]
    assert errors == sorted(errors, reverse=True)


def test_temperatures_belong_to_the_signal(logits: torch.Tensor) -> None:
    s = ReferenceSignals.from_logits(logits, k=8, alpha_temperature=2.0, delta_temperature=0.5)
    torch.testing.assert_close(s.entropy, entropy(logits / 2.0))
    want = torch.log_softmax(logits / 0.5, -1).gather(1, s.topk_ids.long())
    torch.testing.assert_close(s.topk_logprobs.float(), want, atol=2e-2, rtol=1e-3)
    back = ReferenceSignals.from_bytes(s.to_bytes())
    assert (back.alpha_temperature, back.delta_temperature) == (2.0, 0.5)
    with pytest.raises(UserError, match="different temperatures"):
        ReferenceSignals.cat([s, ReferenceSignals.from_logits(logits, k=8)])


def same(a: ReferenceSignals, b: ReferenceSignals) -> bool:
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("topk_ids", "topk_logprobs", "entropy", "tail_mass"))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(num=st.integers(1, 9), k=st.integers(1, 12), cut=st.integers(0, 9))
def test_travel_slice_and_join(num: int, k: int, cut: int) -> None:
    s = ReferenceSignals.from_logits(torch.randn(num, 12), k=k)
    assert same(ReferenceSignals.from_arrow(s.to_arrow()), s)
    assert same(ReferenceSignals.from_bytes(s.to_bytes()), s)
    assert same(ReferenceSignals.cat([s[:cut], s[cut:]]), s)
    wider = ReferenceSignals.cat([s, ReferenceSignals.from_logits(torch.randn(2, 12), k=12)])
    assert same(ReferenceSignals.from_arrow(wider.to_arrow()), wider), "padding is not written, and comes back"


def test_from_hidden_never_differs_from_logits() -> None:
    hidden, head = torch.randn(33, WIDTH), torch.randn(VOCAB, WIDTH)
    s, want = ReferenceSignals.from_hidden(hidden, head, k=6), ReferenceSignals.from_logits(hidden @ head.T, k=6)
    assert torch.equal(s.topk_ids, want.topk_ids)
    assert len(ReferenceSignals.from_hidden(hidden[:0], head, k=6)) == 0


def test_broken_logits_are_refused(logits: torch.Tensor, table: torch.Tensor) -> None:
    for bad in (math.nan, math.inf):
        broken = logits.clone()
        broken[2, 3] = bad
        with pytest.raises(ValueError, match="NaN or"):
            ReferenceSignals.from_logits(broken)
    impossible = logits.clone()
    impossible[:, 5:] = -math.inf
    s = ReferenceSignals.from_logits(impossible, k=8)
    assert torch.isfinite(s.soft_embedding(table)).all() and torch.isfinite(s.entropy).all()
    with pytest.raises(UserError, match="share one vocabulary"):
        ReferenceSignals.from_logits(logits, k=50).soft_embedding(table[:10])


def test_top1_rule_takes_the_top_token(logits: torch.Tensor, table: torch.Tensor) -> None:
    for signals in (DenseSignals(logits), ReferenceSignals.from_logits(logits, k=4)):
        _, delta = residual_state(signals, table, "top1", None)
        assert torch.equal(delta, table[logits.argmax(-1)])
