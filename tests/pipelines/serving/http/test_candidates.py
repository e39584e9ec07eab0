"""`trace_candidates`: what a trace says about the positions that a pass predicts, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from rcd_core.tasks.base import MASK_TEXT
from tests.pipelines.serving.served_app import MODEL, Served, served

PROMPT = f"the {MASK_TEXT}{MASK_TEXT} dog{MASK_TEXT}"
BODY: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "infill": True, "return_trace": "steps"}


@pytest.fixture(scope="module")
def app() -> Iterator[Served]:
    with served(baseline=False) as app:
        yield app


def post(app: Served, **body: Any) -> httpx.Response:
    return httpx.post(f"{app.url}/v1/completions", json={**BODY, **body}, timeout=60)


def test_each_predicted_position_has_its_candidates_in_answers_and_streams(app: Served) -> None:
    answer = post(app, trace_candidates=4).json()["choices"][0]
    steps = answer["rcd"]["steps"]
    for step in steps:
        assert len(step["candidates"]) == len(step["masked"])
        for top, best, text in zip(step["candidates"], step["argmax"], step["argmax_text"], strict=True):
            assert [set(one) for one in top] == [{"text", "id", "probability"}] * 4
            shares = [one["probability"] for one in top]
            assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1.001
            assert all(one["text"] == app.tokenizer.decode([one["id"]]) for one in top)
            assert {"id": best, "text": text} in [{"id": one["id"], "text": one["text"]} for one in top]
    lines = post(app, trace_candidates=4, stream=True).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert [c["rcd"]["step"] for c in chunks if c.get("rcd", {}).get("type") == "trace"] == steps


def test_without_the_field_a_trace_has_none_and_the_answer_is_the_same(app: Served) -> None:
    plain, asked = post(app).json()["choices"][0], post(app, trace_candidates=20).json()["choices"][0]
    assert plain["text"] == asked["text"]
    for step, other in zip(plain["rcd"]["steps"], asked["rcd"]["steps"], strict=True):
        assert "candidates" not in step and len(other.pop("candidates")[0]) == 20
        for name, values in step.items():
            assert other[name] == (pytest.approx(values, abs=1e-4) if name in ("confidence", "entropy") else values)
    assert post(app, trace_candidates=None).status_code == 200


@pytest.mark.parametrize(
    "body", [{"trace_candidates": 21}, {"trace_candidates": "4"}, {"trace_candidates": 4, "return_trace": "summary"}]
)
def test_a_number_out_of_range_or_without_the_steps_is_refused(app: Served, body: dict[str, Any]) -> None:
    refused = post(app, **body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "trace_candidates"
