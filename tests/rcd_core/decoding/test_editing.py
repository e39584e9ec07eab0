"""Editing: residuals, stores, logprobs, refusals. The authors' traces are in test_golden_moe.py; the invariants of
test_decoding.py, test_engine.py and test_pages.py draw editing at random too."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from rcd_core import DecodeSettings, UserError
from rcd_core.decoding.request import make_sequence
from tests.rcd_core.decoding.test_decoding import model
from tests.rcd_core.decoding.test_engine import engine, request, run

EDITING = DecodeSettings(
    block_length=8,
    max_new_tokens=24,
    confidence_threshold=0.3,
    editing_threshold=0.1,
    max_post_steps=3,
    stop_token_ids=(),
    residual=True,
    start="zero",
    trace=True,
)
PROMPT = [3, 1, 4, 1, 5]


def test_residuals_are_those_of_masked_positions() -> None:
    """Where a token stands, the input is that token, and whether an earlier pass predicted it does not matter."""
    out = run(engine("sdar"), request("sdar", PROMPT, EDITING))[0]
    held: set[int] = set()
    for step in out.steps:
        weights = dict(zip(step.masked, step.alpha, strict=True))
        assert not any(weights[p] for p in held & weights.keys())
        held |= set(step.committed)
    assert any(a for step in out.steps for a in step.alpha) and any(step.edited for step in out.steps)


def test_the_mean_of_a_block_is_over_its_masked_positions() -> None:
    uniform = replace(EDITING, alpha="uniform")
    out = run(engine("sdar"), request("sdar", PROMPT, uniform))[0]
    for step in out.steps:
        assert len({a for a in step.alpha if a}) <= 1
    first = next(step for step in out.steps if any(step.alpha))
    before = out.steps[out.steps.index(first) - 1]
    left = [e for p, e in zip(before.masked, before.entropy, strict=True) if p not in before.committed]
    want = sum(left) / len(left) / math.log(model("sdar").vocab_size)
    assert max(first.alpha) == pytest.approx(want, rel=1e-4)


def test_a_last_pass_that_changes_nothing_stores_the_block() -> None:
    e, r = engine("sdar"), request("sdar", PROMPT, replace(EDITING, max_post_steps=16, editing_threshold=0.95))
    e.add(r)
    stored = 0
    while e.busy:
        index = r.block_index
        e.step()
        if r.block_index != index:
            assert (r.stored == r.block[0]) == (not r.steps[-1].committed)
            stored += r.stored == r.block[0]
    assert stored


def test_logprobs_are_those_of_the_last_revision() -> None:
    r = make_sequence(model("sdar"), PROMPT, EDITING, infill=False, has_reference=True, num_logprobs=0)
    out = run(engine("sdar"), r)[0]
    last: dict[int, float] = {}
    for step in out.steps:
        confidence = dict(zip(step.masked, step.confidence, strict=True))
        last |= {p: confidence[p] for p in step.committed}
    revised = {p for step in out.steps for p in step.edited}
    for position in revised:
        assert r.logprobs[position].logprob == pytest.approx(math.log(last[position]), abs=1e-4)
    assert revised


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    [
        ("sdar", {"editing_threshold": 1.5}, "editing_threshold is 1.5"),
        ("sdar", {"max_post_steps": -1}, "max_post_steps is -1"),
        ("sdar", {"max_live_blocks": 2}, "editing_threshold is 0.1"),
        ("sdar", {"sub_block_length": 4}, "editing_threshold is 0.1"),
        ("sdar", {"compat_passes": True}, "editing_threshold is 0.1"),
        ("llada", {}, "editing_threshold is 0.1"),
        ("fast_dllm", {}, "editing_threshold is 0.1"),
    ],
)
def test_what_makes_no_sense_is_refused(family: str, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=field):
        request(family, [1, 2], replace(EDITING, **changes))
