"""Paired comparisons against closed forms and hand calculations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rcd_core.errors import UserError
from rcd_core.evaluation.outcomes import Outcomes
from rcd_core.evaluation.statistics import Comparison, aup, compare, crossing, resample


def outcomes(correct: Any, tokens: Any, denoise: Any, reference: Any = 0.0, weight: float = 0.0) -> Outcomes:
    correct = np.asarray(correct, dtype=float)
    like = np.ones_like(correct)
    return Outcomes(
        thresholds=tuple(0.5 + 0.1 * t for t in range(len(correct))),
        example_ids=tuple(f"{i:04d}" for i in range(correct.shape[1])),
        correct=correct[:, :, None],
        tokens=tokens * like,
        denoise=denoise * like,
        reference=reference * like,
        prefill=0 * like,
        store=2 * like,
        reference_cost=weight * reference * like,
        reference_cost_by_parameters=0 * like,
        seconds=0 * like,
    )


def compared(
    base: Outcomes, other: Outcomes, level: float = 0.9, resamples: int = 2000, seed: int = 0, **options: Any
) -> Comparison:
    curves = [resample(one, resamples, seed) for one in (base, other)]
    return compare(*curves, accuracy_levels=(level,), **options)


def test_crossing_is_linear_between_neighbours_and_takes_the_fastest() -> None:
    rate, accuracy = np.array([8.0, 4.0, 2.0]), np.array([0.5, 0.8, 1.0])
    assert crossing(rate, accuracy, 0.9) == 3.0
    assert crossing(rate, accuracy, 0.8) == 4.0
    assert crossing(accuracy, rate, 6.0) == pytest.approx(0.65)
    assert math.isnan(crossing(rate, accuracy, 0.4)) and math.isnan(crossing(accuracy, rate, 9.0))
    bumpy = np.array([0.5, 0.95, 0.85, 1.0])
    assert crossing(np.array([8.0, 6.0, 4.0, 2.0]), bumpy, 0.9) == pytest.approx(6.0 + 2 * 0.05 / 0.45)
    assert crossing(np.array([5.0, 3.0]), np.array([0.9, 0.9]), 0.9) == 5.0
    assert crossing(np.array([5.0]), np.array([0.9]), 0.9) == 5.0
    assert math.isnan(crossing(np.array([5.0]), np.array([0.8]), 0.9))


def test_crossing_works_row_by_row_and_with_a_level_for_each() -> None:
    rate = np.array([[8.0, 4.0], [8.0, 4.0]])
    accuracy = np.array([[0.8, 1.0], [0.0, 0.5]])
    assert crossing(rate, accuracy, 0.9).tolist() == pytest.approx([6.0, math.nan], nan_ok=True)
    assert crossing(rate, accuracy, np.array([0.9, 0.25])).tolist() == pytest.approx([6.0, 6.0])


# -- area under the curve


def test_aup_of_known_curves() -> None:
    # One point: a rectangle. Constant best accuracy: a rectangle up to the highest rate.
    assert aup(np.array([3.0]), np.array([0.8]), 0.8) == pytest.approx(240)
    assert aup(np.array([8.0, 2.0, 4.0]), np.full(3, 0.8), 0.8) == pytest.approx(640), "points in any order"
    # alpha = 0 is the plain area: 2 x 90 and a trapezoid.
    assert aup(np.array([2.0, 4.0]), np.array([0.9, 0.86]), 0.9, alpha=0.0) == pytest.approx(180 + 2 * 88)
    # By the formula: 2 x 90 + 1/2 (4 - 2) (86 exp(-3 (1 - 86/90)) + 90).
    expected = 180 + 86 * math.exp(-3 * (1 - 86 / 90)) + 90
    assert aup(np.array([2.0, 4.0]), np.array([0.9, 0.86]), 0.9) == pytest.approx(expected)
    # With a better method's best accuracy every weight is below 1; the first rectangle has no weight.
    y, w = np.array([0.9, 0.86]), [math.exp(-3 * (1 - v / 0.95)) for v in (0.9, 0.86)]
    assert aup(np.array([2.0, 4.0]), y, 0.95) == pytest.approx(180 + 90 * w[0] + 86 * w[1])


def test_aup_omits_points_of_low_accuracy() -> None:
    """Points more than 5 percentage points below the slowest point are omitted, at any rate."""
    rate, accuracy = np.array([2.0, 4.0, 6.0, 9.0]), np.array([0.9, 0.84, 0.88, 0.2])
    assert aup(rate, accuracy, 0.9) == pytest.approx(aup(rate[[0, 2]], accuracy[[0, 2]], 0.9))
    assert aup(rate, accuracy, 0.9, offset=1.0) > aup(rate, accuracy, 0.9)
    assert aup(rate, 0 * accuracy, 0.0) == 0


def test_aup_is_computed_row_by_row() -> None:
    rate, accuracy = np.array([[2.0, 4.0], [5.0, 1.0]]), np.array([[0.9, 0.86], [0.5, 0.5]])
    assert aup(rate, accuracy, 0.9).tolist() == pytest.approx(
        [float(aup(r, y, 0.9)) for r, y in zip(rate, accuracy, strict=True)]
    )


def test_twice_the_rate_at_constant_accuracy_is_twice_the_area() -> None:
    correct = np.ones((2, 40))
    slow, fast = (outcomes(correct, 24.0, np.array([[a], [2 * a]])) for a in (6.0, 3.0))
    area = compared(slow, fast).aup
    assert (area.value, area.low, area.high) == pytest.approx((400.0, 400.0, 400.0))  # 100 % x (8 - 4)


# -- speed at equal accuracy


def test_twice_as_fast_is_a_ratio_of_two_with_no_spread() -> None:
    correct = np.array([[1, 1, 0, 0] * 25, [1, 1, 1, 1] * 25])
    slow = outcomes(correct, 24.0, np.array([[6.0], [12.0]]))
    fast = outcomes(correct, 24.0, np.array([[3.0], [6.0]]))
    comparison = compared(slow, fast)
    # Every resample has the same problems for both methods, so its ratio is 2.
    for level in (comparison.levels[0], comparison.best):
        assert (level.ratio.value, level.ratio.low, level.ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    assert (comparison.levels[0].accuracy, comparison.best.accuracy) == (0.9, 1.0)
    assert (comparison.best.baseline_rate, comparison.best.arm_rate) == (2.0, 4.0)
    assert comparison.num_problems == 100


def test_the_fastest_point_with_the_baselines_best_accuracy_counts() -> None:
    """The baseline has 0.9 at rates 4 and 2, so 4 counts. The other method crosses 0.9 halfway from rate 6 to 3."""
    base = outcomes(np.repeat([[1, 0], [1, 0], [0, 0]], [9, 1], axis=1), 24.0, np.array([[6.0], [12.0], [3.0]]))
    other = outcomes(np.repeat([[1, 0, 0], [1, 1, 1]], [8, 1, 1], axis=1), 24.0, np.array([[4.0], [8.0]]))
    best = compared(base, other, resamples=20).best
    assert (best.accuracy, best.baseline_rate, best.arm_rate) == pytest.approx((0.9, 4.0, 4.5))
    assert best.ratio.value == pytest.approx(4.5 / 4)


def test_reference_passes_cost_their_weight_but_not_in_the_papers_measure() -> None:
    correct = np.array([[1, 0], [1, 1]])
    seqd = outcomes(correct, 24.0, np.array([[6.0], [12.0]]))
    rcd = outcomes(correct, 24.0, np.array([[4.0], [8.0]]), reference=np.array([[4.0], [8.0]]), weight=0.5)
    assert compared(seqd, rcd, resamples=10).levels[0].ratio.value == pytest.approx(1.0)  # 4 + 0.5 x 4 = 6
    paper = compared(seqd, rcd, resamples=10, measure="tokens_per_forward")
    assert paper.levels[0].ratio.value == pytest.approx(1.5) and paper.measure == "tokens_per_forward"


def test_a_level_that_is_not_crossed_gives_no_number_but_a_side() -> None:
    denoise = np.array([[3.0], [6.0]])
    good, poor = (outcomes(np.full((2, 10), 0.0) + np.array([[a], [b]]), 24.0, denoise) for a, b in ((0, 1), (0, 0)))
    for pair, sides in (((poor, good), ("below", "crossed")), ((good, poor), ("crossed", "below"))):
        level = compared(*pair, resamples=50).levels[0]
        assert (level.ratio.value, level.ratio.low, level.ratio.high) == (None, None, None)
        assert (level.baseline, level.arm) == sides
    high = compared(good, outcomes(np.ones((2, 10)), 24.0, denoise), resamples=50).levels[0]
    assert (high.arm, high.arm_rate) == ("above", None)
    assert high.baseline_rate == pytest.approx(4.4), "nine tenths of the way from rate 8 to rate 4"


# -- accuracy at equal speed


def test_gains_are_differences_of_accuracy_at_equal_rates() -> None:
    num = 1000
    rng = np.random.default_rng(0)
    denoise = np.array([[3.0], [6.0], [12.0]])
    easy = rng.random(num)
    base = outcomes([easy < p for p in (0.3, 0.6, 0.9)], 24.0, denoise)
    other = outcomes([easy < p for p in (0.5, 0.8, 1.0)], 24.0, denoise)
    comparison = compared(base, other, level=0.7)
    rates = [gain.rate for gain in comparison.gains]
    assert rates == pytest.approx(np.linspace(2, 8, 7)[1:-1].tolist())
    for gain in comparison.gains:
        assert gain.difference.value == pytest.approx(0.2, abs=0.06)
        assert gain.difference.value == pytest.approx(gain.arm_accuracy - gain.baseline_accuracy)
        low, high = gain.difference.low, gain.difference.high
        assert low is not None and high is not None and low < gain.difference.value < high
        assert high - low < 0.06  # paired: SD of a paired difference of .2 is .0126; unpaired it would be .02
    ratio = comparison.levels[0].ratio.value
    assert ratio is not None and ratio > 1


def test_a_constant_difference_has_no_spread() -> None:
    """One method solves every problem and the baseline none, at every threshold."""
    solved = np.tile(np.arange(100) % 2 == 0, (2, 1))
    base = outcomes(np.zeros((2, 100)), 24.0, np.array([[4.0], [12.0]]))
    sure = outcomes(np.ones((2, 100)), 24.0, np.array([[4.0], [12.0]]))
    for gain in compared(base, sure, resamples=200).gains:
        assert (gain.difference.value, gain.difference.low, gain.difference.high) == pytest.approx((1.0, 1.0, 1.0))
    half = compared(base, outcomes(solved, 24.0, np.array([[4.0], [12.0]])), resamples=200).gains[0].difference
    assert half.low is not None and half.low < half.value


def test_bootstrap_interval_has_the_width_of_theory() -> None:
    # One binary difference per problem: the SD of its mean is known.
    num, p = 2000, 0.3
    differs = np.arange(num) < p * num
    zeros, rates = np.zeros((2, num)), np.array([[4.0], [12.0]])
    base = outcomes(zeros, 24.0, rates)
    other = outcomes(np.stack([differs, differs]), 24.0, rates)
    gain = compared(base, other, resamples=2000).gains[0].difference
    sd = math.sqrt(p * (1 - p) / num)
    assert gain.value == pytest.approx(p)
    assert gain.low == pytest.approx(p - 1.96 * sd, abs=0.1 * sd)
    assert gain.high == pytest.approx(p + 1.96 * sd, abs=0.1 * sd)


def test_bootstrap_interval_has_its_nominal_coverage() -> None:
    """200 simulated evaluations of paired binary answers with a known difference. At 95 % the count has mean 190 and SD
    3.1; without pairing the wider intervals would contain the truth 199 or 200 times."""
    rng, covered = np.random.default_rng(7), 0
    rates = np.array([[4.0], [12.0]])
    for _ in range(200):
        draw = rng.random(120)
        base, other = draw < 0.4, (draw < 0.38) | (draw > 0.88)  # 0.4 against 0.5, right together in 0.38
        gain = compared(
            outcomes(np.stack([base, base]), 24.0, rates),
            outcomes(np.stack([other, other]), 24.0, rates),
            resamples=250,
            seed=int(rng.integers(1 << 30)),
        ).gains[0]
        assert gain.difference.low is not None and gain.difference.high is not None
        covered += gain.difference.low <= 0.1 <= gain.difference.high
    assert 178 <= covered <= 198


def test_disjoint_ranges_give_no_gains() -> None:
    correct = np.ones((2, 10))
    slow, fast = (outcomes(correct, 24.0, np.array([[a], [2 * a]])) for a in (12.0, 2.0))
    assert compared(slow, fast, resamples=10).gains == ()


def test_samples_of_a_problem_are_drawn_together() -> None:
    """Two samples that always agree count as one."""
    rng = np.random.default_rng(3)
    right, rates = rng.random((2, 80)) < 0.6, np.array([[4.0], [12.0]])
    one, base = outcomes(right, 24.0, rates), outcomes(np.zeros((2, 80)), 24.0, rates)
    two = replace(one, correct=np.repeat(one.correct, 2, axis=2))
    assert compared(base, one, resamples=200).gains == compared(base, two, resamples=200).gains


def test_comparison_is_repeatable_and_needs_the_same_problems() -> None:
    rng = np.random.default_rng(1)
    methods = [outcomes(rng.random((3, 50)) < 0.8, 24.0, np.array([[3.0], [6.0], [12.0]])) for _ in range(2)]
    assert compared(*methods, seed=4) == compared(*methods, seed=4)
    fewer = outcomes(np.ones((3, 49)), 24.0, 3.0)
    with pytest.raises(UserError, match="example_id"):
        compared(methods[0], fewer)
