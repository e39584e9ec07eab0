"""Thresholds are chosen on one half of the problems and reported on the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rcd_core.errors import UserError
from rcd_core.evaluation.advice import advise
from rcd_core.evaluation.outcomes import Outcomes, collect


def outcomes(right: dict[float, list[bool]], passes: dict[float, int]) -> Outcomes:
    rows: list[dict[str, Any]] = [
        {
            "arm": "a", "threshold": threshold, "example_id": f"{i:03d}", "correct": correct, "tokens": 10,
            "denoise": passes[threshold], "reference": 0, "prefill": 0, "store": 0,
        }
        for threshold, column in right.items()
        for i, correct in enumerate(column)
    ]  # fmt: skip
    return collect(rows)["a"]


PASSES = {0.5: 2, 0.9: 5}


def test_the_reported_figures_are_of_problems_that_the_choice_did_not_see() -> None:
    # Even problems: both methods at their best at .5 and .9; odd ones: everything else.
    baseline = outcomes({0.5: [False, True] * 10, 0.9: [True, False] * 10}, PASSES)
    method = outcomes({0.5: [True, False] * 10, 0.9: [True, True] * 10}, PASSES)
    advice = advise(baseline, method)
    assert advice is not None and (advice.chosen_on, advice.measured_on, advice.reaches) == (10, 10, True)
    assert (advice.arm.threshold, advice.arm.accuracy, advice.arm.num_problems) == (0.5, 0.0, 10)
    assert (advice.baseline.threshold, advice.baseline.accuracy) == (0.9, 0.0)


def test_a_method_that_never_reaches_the_baseline_is_shown_at_its_best() -> None:
    baseline = outcomes({0.5: [True] * 8, 0.9: [True] * 8}, PASSES)
    method = outcomes({0.5: [False] * 8, 0.9: [True, True, False, False] * 2}, PASSES)
    advice = advise(baseline, method)
    assert advice is not None and not advice.reaches
    assert (advice.arm.threshold, advice.arm.tokens_per_pass) == (0.9, 2.0)
    assert advice.baseline.threshold == 0.5, "of two equally accurate ones the faster"


def test_choosing_among_equal_thresholds_by_luck_does_not_look_like_a_gain() -> None:
    """Of equally good thresholds, the best one on some problems is too good there, and not on others."""
    random = np.random.default_rng(0)
    chosen, reported = [], []
    for _ in range(30):
        thresholds = {t / 20: list(random.random(100) < 0.7) for t in range(20)}
        passes = {t: 5 for t in thresholds}
        method, baseline = outcomes(thresholds, passes), outcomes(thresholds, passes)
        advice = advise(baseline, method)
        assert advice is not None
        chosen.append(max(np.mean(column) for column in thresholds.values()))
        reported.append(advice.arm.accuracy)
    assert np.mean(chosen) > 0.76 and abs(np.mean(reported) - 0.7) < 0.03


def test_one_problem_and_other_problems() -> None:
    one = outcomes({0.5: [True], 0.9: [True]}, PASSES)
    assert advise(one, one) is None
    with pytest.raises(UserError, match="different example_id"):
        advise(one, outcomes({0.5: [True] * 2, 0.9: [True] * 2}, PASSES))
