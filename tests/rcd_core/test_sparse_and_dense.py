"""Sparse and dense signals, while training and while decoding, give one alpha under every rule and temperature."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from rcd_core import ReferenceSignals, UserError
from rcd_core.alpha import LearnedAlpha
from rcd_core.decode_settings import CONFIDENCE_RULES, AlphaRule
from rcd_core.dense_signals import DenseSignals
from rcd_core.ops.reduce import Feedback, Table, reduce_greedy
from rcd_core.signals import residual_state, sparse_residual

VOCAB, WIDTH, MASK = 40, 6, 39
SCALE = 2.5
RULES = [rule for rule in get_args(AlphaRule) if rule != "ramp"]
everywhere = [
    pytest.mark.parametrize("rule", RULES),
    pytest.mark.parametrize("t_res", [0.5, 1.0, 2.0]),
    pytest.mark.parametrize("delta", ["one", "residual"]),
]


def case(t_res: float, delta: str) -> tuple[torch.Tensor, torch.Tensor, LearnedAlpha, dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, VOCAB, generator=generator) * 2
    logits[:, 1] = -torch.inf  # a token that is impossible
    logits[:, MASK] = 9.0  # mass on the mask: alpha is of the whole prediction
    network = LearnedAlpha()
    torch.nn.init.normal_(network.out.weight, std=2.0, generator=generator)
    temperatures = {"alpha_temperature": t_res, "delta_temperature": t_res if delta == "residual" else 1.0}
    return logits, torch.randn(VOCAB, WIDTH, generator=generator), network, temperatures


def for_all(function):  # type: ignore[no-untyped-def]
    for mark in everywhere:
        function = mark(function)
    return function


@for_all
def test_all_ids_kept_equals_dense_signals(rule: AlphaRule, t_res: float, delta: str) -> None:
    logits, table, network, temperatures = case(t_res, delta)
    sparse = ReferenceSignals.from_logits(logits, VOCAB, **temperatures)
    want = residual_state(DenseSignals(logits, **temperatures), table, rule, SCALE, learned=network)
    read = ReferenceSignals.from_bytes(sparse.to_bytes())
    joined = ReferenceSignals.cat([read[:4], read[4:], ReferenceSignals.empty(VOCAB, *temperatures.values())])
    for signals in (sparse, read, joined):
        got = residual_state(signals, table, rule, SCALE, learned=network)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, atol=4e-3, rtol=0)  # fp16 log-probabilities
    alpha = sparse_residual(sparse, VOCAB, rule, SCALE, learned=network).alpha
    torch.testing.assert_close(alpha, want[0], atol=4e-3, rtol=0)


@for_all
def test_all_entries_kept_equals_dense_feedback(rule: AlphaRule, t_res: float, delta: str) -> None:
    logits, table, network, temperatures = case(t_res, delta)
    weights = Table(table, network)
    sparse, dense = (
        reduce_greedy(logits.clone(), MASK, Feedback(rule, SCALE, top_k=k, **temperatures), weights)
        for k in (VOCAB, None)
    )
    for x, y in zip(sparse, dense, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_logits_in_fp64_are_reduced_in_fp64(rule: AlphaRule) -> None:
    """Where sparse and dense sums are taken in fp64, they agree to more digits than fp32 has."""
    logits, table, network, temperatures = case(2.0, "one")
    weights = Table(table.double(), network.double())
    sparse, dense = (
        reduce_greedy(logits.double(), MASK, Feedback(rule, SCALE, top_k=k, **temperatures), weights)
        for k in (VOCAB, None)
    )
    for x, y in zip(sparse[1:], dense[1:], strict=True):
        assert x.dtype == torch.float64
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_alpha_does_not_depend_on_how_many_ids_are_kept(rule: AlphaRule) -> None:
    logits, table, network, temperatures = case(2.0, "one")
    want = DenseSignals(logits, **temperatures).alpha(VOCAB, rule, SCALE, learned=network)
    for k in (1, 3):
        signals = ReferenceSignals.from_logits(logits, k, **temperatures)
        torch.testing.assert_close(signals.alpha(VOCAB, rule, SCALE, learned=network), want)
        torch.testing.assert_close(signals.largest(1).alpha(VOCAB, rule, SCALE, learned=network), want)
        feedback = Feedback(rule, SCALE, top_k=k, **temperatures)
        alpha = reduce_greedy(logits.clone(), MASK, feedback, Table(table, network)).alpha
        torch.testing.assert_close(alpha, want)


@pytest.mark.parametrize("rule", RULES)
def test_stored_signals_without_the_largest_probability_at_the_alpha_temperature(rule: AlphaRule) -> None:
    """As in Parquet files. With all ids it follows from the rest; else a rule that needs it is refused by name."""
    logits, _, network, temperatures = case(2.0, "one")
    want = DenseSignals(logits, **temperatures).alpha(VOCAB, rule, SCALE, learned=network)
    possible = logits[:, [i for i in range(VOCAB) if i != 1]]
    whole = replace(ReferenceSignals.from_logits(possible, VOCAB - 1, **temperatures), confidence=None)
    dense = DenseSignals(possible, **temperatures).alpha(VOCAB - 1, rule, SCALE, learned=network)
    torch.testing.assert_close(whole.alpha(VOCAB - 1, rule, SCALE, learned=network), dense, atol=2e-3, rtol=0)
    some = replace(ReferenceSignals.from_logits(logits, 3, **temperatures), confidence=None)
    if rule in CONFIDENCE_RULES:
        with pytest.raises(UserError, match=rf"{rule}.*alpha_temperature 2\.0.*delta_temperature 1\.0"):
            some.alpha(VOCAB, rule, SCALE, learned=network)
    else:
        torch.testing.assert_close(some.alpha(VOCAB, rule, SCALE, learned=network), want)
