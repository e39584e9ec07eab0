"""results.json from made-up rows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipelines.evaluation.results import analyse
from rcd_core.errors import UserError
from rcd_core.evaluation.statistics import aup
from tests.pipelines.report.made_results import THRESHOLDS, answers, info, made


def test_results_are_json_and_say_what_was_measured() -> None:
    results = made()
    assert json.loads(json.dumps(results, allow_nan=False)) == json.loads(json.dumps(results))
    numbers = [results[name] for name in ("schema_version", "seed", "num_problems", "num_samples")]
    assert numbers == [2, 3, 60, 1] and results["thresholds"] == list(THRESHOLDS)
    seqd, rcd = results["arms"]
    assert (seqd["reference_weight"], seqd["reference_flops_weight"]) == (0.0, 0.0)
    assert (rcd["reference_weight"], rcd["reference_flops_weight"]) == pytest.approx((0.45, 0.4))
    assert "confidence_threshold" not in rcd["decode"] and rcd["decode"]["alpha_scale"] == 1.7312
    assert seqd["curve"][0]["tokens_per_second"] == pytest.approx(120 / 0.01)
    assert results["statistics"]["leading_measure"] == "tokens_per_pass"


def test_reference_passes_count_in_tokens_per_pass_only() -> None:
    """At 1.5 times the speed, threshold 0.6: 8 passes and one of the reference for 120 tokens."""
    results = made()
    point = results["arms"][1]["curve"][0]
    assert point["tokens_per_forward"] == 15
    assert point["tokens_per_pass"] == pytest.approx(120 / 8.4)
    assert point["tokens_per_pass_by_parameters"] == pytest.approx(120 / 8.45)
    (comparison,) = results["comparisons"]
    assert comparison["tokens_per_forward"]["best"]["ratio"]["value"] == pytest.approx(1.5)
    assert comparison["tokens_per_pass"]["best"]["ratio"]["value"] == pytest.approx(60 / 40.4)


def test_aup_is_the_area_under_the_curve() -> None:
    results = made()
    best = results["statistics"]["aup"]["best_accuracy"]
    for arm in results["arms"]:
        rate, accuracy = (np.array([p[name] for p in arm["curve"]]) for name in ("tokens_per_pass", "accuracy"))
        assert arm["aup"]["tokens_per_pass"]["value"] == pytest.approx(float(aup(rate, accuracy, best)))


def test_several_samples_change_the_interval() -> None:
    results = made(samples=3)
    assert results["num_samples"] == 3 and "standard errors" in results["statistics"]["accuracy_interval"]
    assert len(results["arms"][0]["curve"][0]["accuracy_by_sample"]) == 3
    assert "Wilson" in made()["statistics"]["accuracy_interval"]


def test_a_missing_row_is_refused() -> None:
    with pytest.raises(UserError, match="seqd"):
        analyse(
            recipe="r", task="t", seed=0, methods=[info("seqd", "SeqD")], table=answers("seqd", 1.0, 0.4).slice(1),
            settings={"seqd": {}}, accuracy_levels=(), hardware={},
        )  # fmt: skip
