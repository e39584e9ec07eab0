"""Information in discarded predictions, and agreement of decoding's residuals with the reference's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from rcd_core import Decoder, DecodeSettings
from rcd_core.calibration.diagnostics import Agreement, Discarded, _divergences, progress_bins
from tests.rcd_core.decoding.test_decoding import FAMILIES, model

PROMPTS = [[5, 6, 7], [9] * 6, [17, 3]]
PLAIN = DecodeSettings(block_length=8, max_new_tokens=16, policy="low_confidence_static", stop_token_ids=(), seed=0)


def with_residuals(**changes: Any) -> DecodeSettings:
    return DecodeSettings(**{**vars(PLAIN), "residual": True, "start": "zero", "residual_temperature": 1.0, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_top_1_of_discarded_predictions_agrees_with_the_trace(family: str) -> None:
    target = model(family)
    discarded = Discarded(target, ks=(1, 5, target.vocab_size - 1))
    traced = DecodeSettings(**{**vars(PLAIN), "trace": True})
    outputs = Decoder(target, observer=discarded).generate(PROMPTS, traced)
    hits = total = 0
    for out in outputs:
        for step in out.steps:
            for position, guess in zip(step.masked, step.argmax, strict=True):
                if position not in step.committed:
                    total += 1
                    hits += guess == out.canvas_ids[position]
    report = discarded.report()
    assert sum(report["predictions"]) == total > 50
    assert report["overall"]["1"] == pytest.approx(hits / total, abs=1e-6)
    assert report["overall"]["1"] <= report["overall"]["5"] <= report["overall"][str(target.vocab_size - 1)] == 1.0


def test_progress_starts_with_nothing_committed() -> None:
    assert progress_bins(np.array([1.0, 0.91, 0.5, 0.01])).tolist() == [0, 0, 5, 9]


def test_divergences_of_two_coins() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    divergences = _divergences(p, q, "p", "q")
    assert divergences["kl_p_q"][0] == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert divergences["kl_q_p"][0] == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))
    middle = torch.tensor([[0.7, 0.3]]).log()
    halves = (_divergences(a, middle, "a", "m")["kl_a_m"][0] for a in (p, q))
    assert divergences["js"][0] == pytest.approx(sum(halves) / 2, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_agrees_with_itself_at_alpha_near_zero(family: str) -> None:
    """With alpha of 1e-9 the reference, the same model without residuals, gets the same input."""
    agreement = Agreement(model(family), model(family))
    settings = with_residuals(alpha="calibrated_entropy", alpha_scale=1e9)
    outputs = Decoder(model(family), observer=agreement).generate(PROMPTS, settings)
    report = agreement.report()["agreement"]
    assert report["overall"]["positions"] == sum(report["by_progress"]["positions"]) > 50
    assert sum(report["by_entropy"]["positions"]) == report["overall"]["positions"]
    assert report["overall"]["same_top1"] == 1.0 and abs(report["overall"]["js"]) < 1e-5
    assert len(outputs) == len(PROMPTS)


def test_another_model_differs_and_a_higher_temperature_raises_alpha() -> None:
    overall = {}
    for t in (1.0, 2.0):
        agreement = Agreement(model("sdar"), model("sdar_ref_tiny"))
        Decoder(model("sdar"), observer=agreement).generate(PROMPTS, with_residuals(residual_temperature=t))
        overall[t] = agreement.report()["agreement"]["overall"]
        assert min(overall[t]["kl_reference_self"], overall[t]["kl_self_reference"]) > overall[t]["js"] > 0.01
        assert overall[t]["js"] < math.log(2)
    assert overall[2.0]["alpha_self"] > overall[1.0]["alpha_self"] + 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_staleness_counts_repeated_predictions(family: str) -> None:
    """One block, one token per pass: after the first pass every masked position has an older prediction. A shifted
    model gives the block's first token to the pass before."""
    agreement = Agreement(model(family), None)
    settings = with_residuals(policy="sequential", max_new_tokens=8)
    Decoder(model(family), observer=agreement).generate([[1] * 8], settings)
    report, masked = agreement.report(), 8 - (family == "fast_dllm")
    assert "agreement" not in report and sum(report["staleness"]["positions"]) == sum(range(1, masked))
    assert all(v is None or v > 0 for v in report["staleness"]["kl_fresh_stale"])
