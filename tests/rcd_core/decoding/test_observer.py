"""Observers change nothing, and see the predictions and commits of every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcd_core import DecodeSettings
from rcd_core.decoding.observer import Observed
from tests.rcd_core.decoding.test_decoding import FAMILIES, any_settings, decoder, many, model, prompts
from tests.rcd_core.decoding.test_engine import engine, request, run


class Recorder:
    """An observer that records each step by request."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.steps: dict[int, list[dict[str, Any]]] = {}

    def __call__(self, seen: Observed) -> None:
        logits = model(self.family).head(seen.hidden)
        assert len(logits) == len(seen.alpha) == len(seen.committed) == len(seen.has_residual) == len(seen.masked_share)
        blocks = seen.masked.blocks
        for s in dict.fromkeys(b.sequence for b in blocks):
            own = np.array([b.sequence is s for b in blocks])[seen.masked.owner]
            positions = seen.masked.positions[own]
            holds_token = s.canvas[positions] != s.model.mask_token_id
            assert not holds_token.any() or s.settings.editing_threshold is not None, "nothing is committed yet"
            assert not (seen.discarded[own] & (holds_token | seen.committed[own])).any()
            self.steps.setdefault(id(s), []).append(
                {
                    "masked": positions.tolist(),
                    "logits": logits[torch.from_numpy(own)].clone(),
                    "alpha": seen.alpha[own].tolist(),
                    "has_residual": seen.has_residual[own].tolist(),
                    "committed": positions[seen.committed[own]].tolist(),
                    "share": seen.masked_share[own],
                    "start_pass": all(b.is_start_pass for b in blocks if b.sequence is s),
                }
            )


def decode(family: str, several: list[Any], observer: Any, fixed: bool) -> list[Any]:
    requests = [request(family, prompt, settings) for prompt, settings in several]
    run(engine(family, max_batch=3, fixed_shapes=fixed, observer=observer), *requests)
    return requests


@pytest.mark.parametrize("family", FAMILIES)
@many
@given(data=st.data())
def test_an_observer_changes_nothing(family: str, data: st.DataObject) -> None:
    several = data.draw(st.lists(st.tuples(prompts, any_settings(family)), min_size=1, max_size=4))
    seen, fixed = Recorder(family), data.draw(st.booleans())
    plain, observed = decode(family, several, None, fixed), decode(family, several, seen, fixed)
    for one, other in zip(plain, observed, strict=True):
        assert one.output().token_ids == other.output().token_ids
        assert one.output().num_forwards == other.output().num_forwards
        shown = [step for step in seen.steps[id(other)] if step["masked"] and not step["start_pass"]]
        assert len(shown) == len(other.steps)
        for step, traced in zip(shown, other.steps, strict=True):
            inside = [i for i, p in enumerate(step["masked"]) if p in traced.masked]
            assert sorted(step["committed"]) == sorted(traced.committed)
            assert [step["alpha"][i] for i in inside] == pytest.approx(traced.alpha)


def test_the_head_on_the_hidden_states_gives_the_tokens() -> None:
    settings = DecodeSettings(
        block_length=4, max_new_tokens=12, policy="low_confidence_static", residual=True, start="zero", trace=True
    )
    for family in FAMILIES:
        seen = Recorder(family)
        (request,) = decode(family, [([5, 6, 7, 8], settings)], seen, False)
        steps = seen.steps[id(request)]
        assert len(steps) == len(request.steps) > 3
        for step, traced in zip(steps, request.steps, strict=True):
            logits = step["logits"].index_fill(1, torch.tensor([model(family).mask_token_id]), -torch.inf)
            assert logits.argmax(-1).tolist() == traced.argmax
        first = int(family == "fast_dllm")  # its first pass predicts one token, without residuals
        assert not any(steps[first]["has_residual"]) and all(steps[first + 1]["has_residual"]), (
            "a zero start has no residuals in its first pass"
        )


def test_masked_share_is_of_the_block_or_of_the_canvas() -> None:
    settings = DecodeSettings(block_length=4, max_new_tokens=8, policy="sequential", stop_token_ids=())
    shares = {}
    for family in FAMILIES:
        seen = Recorder(family)
        (request,) = decode(family, [([5, 6, 7, 8], settings)], seen, False)
        shares[family] = [step["share"][0] for step in seen.steps[id(request)]]
    assert shares["sdar"] == [1.0, 0.75, 0.5, 0.25] * 2
    assert shares["llada"] == [i / 8 for i in range(8, 0, -1)]


def test_a_decoder_passes_its_observer_on() -> None:
    sizes: list[int] = []
    found = decoder("sdar", observer=lambda seen: sizes.append(len(seen.alpha))).generate(
        [[1, 2], [3]], DecodeSettings(block_length=4, max_new_tokens=4)
    )
    assert len(found) == 2 and sizes and np.all(np.array(sizes) > 0)
