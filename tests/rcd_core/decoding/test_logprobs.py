"""Logprobs of new tokens: against a direct computation, and independent of the batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from rcd_core import DecodeSettings, UserError
from rcd_core.decoding.request import make_sequence
from rcd_core.decoding.stream import BlockDone, stream
from tests.rcd_core.decoding.test_decoding import FAMILIES, model
from tests.rcd_core.decoding.test_engine import engine, run

SAMPLED = DecodeSettings(
    block_length=4, max_new_tokens=14, stop_token_ids=(), temperature=0.7, top_k=3, top_p=0.9, seed=5, trace=True
)


def request(family: str, prompt: list[int], settings: DecodeSettings, top: int | None) -> Any:
    return make_sequence(model(family), prompt, settings, infill=False, has_reference=True, num_logprobs=top)


def direct(s: Any) -> dict[int, torch.Tensor]:
    """(V,) log-softmax of a plain forward, by position: of a canvas with the masks of the pass that committed it."""
    found = {}
    for step in s.steps:
        block_end = next(end for start, end in s.blocks if start <= step.masked[0] < end)
        canvas = s.canvas.copy()
        canvas[[*step.masked, *range(block_end, len(canvas))]] = s.model.mask_token_id
        with torch.inference_mode():
            logprobs = torch.log_softmax(s.model.logits(torch.from_numpy(canvas[None]), 4)[0].float(), -1)
        found |= {p: logprobs[p] for p in step.committed}
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [SAMPLED, replace(SAMPLED, temperature=0.0), replace(SAMPLED, policy="random")])
def test_logprobs_are_those_of_a_forward_of_the_committing_pass(family: str, settings: DecodeSettings) -> None:
    """At temperature 1 and over the whole vocabulary, whatever the settings of the draw."""
    s = request(family, [3, 4, 5], settings, 20)
    (out,) = run(engine(family, fixed_shapes=True), s)
    expected = direct(s)
    reported = s.logprobs_of(0, len(out.token_ids))
    assert len(reported) == len(out.token_ids) == 14
    for i, (token, got) in enumerate(zip(out.token_ids, reported, strict=True)):
        logprobs = expected[3 + i]
        assert got.logprob == pytest.approx(float(logprobs[token]), abs=1e-4)
        values = [value for _, value in got.top]
        assert values == sorted(values, reverse=True)
        np.testing.assert_allclose(values, logprobs.topk(20).values, atol=1e-4)
        np.testing.assert_allclose(values, [float(logprobs[j]) for j, _ in got.top], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_depend_on_nothing_else_in_the_batch(family: str) -> None:
    """Some requests of the batch ask for logprobs, some for more than others; tokens stay as they are without."""
    several: list[tuple[DecodeSettings, int | None]] = [
        (replace(SAMPLED, residual=True, start="reference"), 20),
        (replace(SAMPLED, residual=True, start="self", temperature=0.0), 0),
        (replace(SAMPLED, block_length=3, stop_token_ids=(91, 231)), None),
        (SAMPLED, 1),
    ]
    prompts = [[7] * (3 + i) for i in range(4)]
    batch = [request(family, prompt, *one) for prompt, one in zip(prompts, several, strict=True)]
    outputs = run(engine(family, max_batch=3, fixed_shapes=True), *batch)
    for prompt, (settings, top), together, out in zip(prompts, several, batch, outputs, strict=True):
        alone = request(family, prompt, settings, top)
        num_tokens = len(out.token_ids)
        assert run(engine(family), alone)[0].token_ids == out.token_ids
        assert run(engine(family), request(family, prompt, settings, None))[0].token_ids == out.token_ids
        assert len(together.logprobs_of(0, num_tokens)) == (0 if top is None else num_tokens)
        for one, other in zip(together.logprobs_of(0, num_tokens), alone.logprobs_of(0, num_tokens), strict=True):
            assert len(one.top) == len(other.top) == top
            # In fp32 rounding depends on the batch, and residuals carry it from pass to pass.
            assert one.logprob == pytest.approx(other.logprob, abs=2e-3)
            np.testing.assert_allclose([v for _, v in one.top], [v for _, v in other.top], atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_has_the_logprobs_of_its_tokens(family: str) -> None:
    s = request(family, [3, 4, 5], SAMPLED, 2)
    events = [e for e in stream(engine(family), [s]) if isinstance(e, BlockDone)]
    assert len(events) > 1
    assert all(len(e.logprobs) == len(e.token_ids) for e in events)
    assert [one for e in events for one in e.logprobs] == s.logprobs_of(0, 14)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("residual", [False, True])
def test_the_trace_has_the_candidates_of_each_position_if_asked(family: str, residual: bool) -> None:
    """Beside requests that want none or others, and with the same tokens as without. Infill has them too."""
    settings = replace(SAMPLED, residual=residual, start="zero" if residual else None)
    make = partial(make_sequence, model(family), settings=settings, has_reference=True)
    mask = model(family).mask_token_id
    prompts: list[tuple[list[int], bool, int]] = [
        ([3, 4, 5], False, 4),
        ([3, 4, 5], False, 0),
        ([7, mask, mask, 9, mask], True, 2),
    ]
    batch = [make(ids=ids, infill=infill, num_candidates=k) for ids, infill, k in prompts]
    outputs = run(engine(family, max_batch=3, fixed_shapes=True), *batch)
    assert outputs[0].token_ids == outputs[1].token_ids
    assert all(step.candidates == [] for step in batch[1].steps)
    for s, (_, _, k) in zip(batch[::2], prompts[::2], strict=True):
        for step in s.steps:
            assert [len(top) for top in step.candidates] == [k] * len(step.masked)
            for top, entropy in zip(step.candidates, step.entropy, strict=True):
                values = [p for _, p in top]
                assert values == sorted(values, reverse=True) and 0 < sum(values) < 1.001
                assert -sum(p * np.log(p) for p in values) < entropy + 1e-3  # a part of its sum


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_are_those_of_a_plain_forward(family: str) -> None:
    settings = replace(SAMPLED, temperature=0.0)
    s = make_sequence(model(family), [3, 4, 5], settings, infill=False, has_reference=True, num_candidates=3)
    run(engine(family), s)
    expected = direct(s)
    for step in s.steps:
        for position, token, confidence, top in zip(
            step.masked, step.argmax, step.confidence, step.candidates, strict=True
        ):
            own = dict(top).get(token)  # the mask token may come before it
            assert own is None or own == pytest.approx(confidence, abs=1e-4)
            if position in step.committed:
                np.testing.assert_allclose([p for _, p in top], expected[position].topk(3).values.exp(), atol=1e-4)
    read = s.steps[0].readable(lambda ids: f"<{ids[0]}>")
    assert read["argmax_text"] == [f"<{i}>" for i in s.steps[0].argmax]
    assert [one["id"] for one in read["candidates"][0]] == [i for i, _ in s.steps[0].candidates[0]]
    assert read["candidates"][0][0]["text"] == f"<{read['candidates'][0][0]['id']}>"


def test_infill_has_no_logprobs() -> None:
    with pytest.raises(UserError, match="logprobs"):
        make_sequence(model("sdar"), [3, 511], SAMPLED, infill=True, has_reference=True, num_logprobs=1)
