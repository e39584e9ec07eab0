"""Statistics against closed forms and cases worked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rcd_core.errors import UserError
from rcd_core.evaluation import Outcomes, collect, compare, crossing, curve, wilson_interval


def outcomes(correct: Any, tokens: Any, denoise: Any, reference: Any = 0.0) -> Outcomes:
    correct = np.asarray(correct, dtype=float)
    like = np.ones_like(correct)
    thresholds = tuple(0.5 + 0.1 * t for t in range(len(correct)))
    ids = tuple(f"{i:04d}" for i in range(correct.shape[1]))
    return Outcomes(thresholds, ids, correct, tokens * like, denoise * like, reference * like, 0 * like, 2 * like)


def test_wilson_interval_solves_its_defining_equation() -> None:
    # The ends are the p with |p^ - p| = z sqrt(p (1 - p) / n) (Wilson 1927).
    for successes, trials in ((0, 10), (3, 10), (10, 10), (512, 1024)):
        for end in wilson_interval(successes, trials, z=1.96):
            distance = 1.96 * math.sqrt(end * (1 - end) / trials)
            assert abs(successes / trials - end) == pytest.approx(distance, abs=1e-12)


def test_wilson_interval_of_known_values() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert [wilson_interval(0, n)[0] for n in range(1, 50)] == [0.0] * 49
    assert [wilson_interval(n, n)[1] for n in range(1, 50)] == [1.0] * 49
    with pytest.raises(UserError, match="no problems"):
        wilson_interval(0, 0)


def test_curve_by_hand() -> None:
    arm = outcomes([[1, 0, 1, 1]], np.array([[10, 20, 30, 40]]), np.array([[5, 5, 5, 10]]), np.array([[1, 1, 1, 1]]))
    (point,) = curve(arm, reference_weight=0.25)
    assert (point.num_problems, point.accuracy) == (4, 0.75)
    assert point.tokens_per_forward == 100 / 25  # a ratio of sums, not the mean of 2, 4, 6 and 4
    assert point.tokens_per_pass == 100 / 26
    assert (point.mean_denoise, point.mean_reference, point.mean_store) == (6.25, 1, 2)
    assert (point.accuracy_low, point.accuracy_high) == wilson_interval(3, 4)


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


def test_crossing_works_row_by_row() -> None:
    rate = np.array([[8.0, 4.0], [8.0, 4.0]])
    accuracy = np.array([[0.8, 1.0], [0.0, 0.5]])
    assert crossing(rate, accuracy, 0.9).tolist() == pytest.approx([6.0, math.nan], nan_ok=True)


def test_twice_as_fast_is_a_ratio_of_two_with_no_spread() -> None:
    correct = np.array([[1, 1, 0, 0] * 25, [1, 1, 1, 1] * 25])
    slow = outcomes(correct, 24.0, np.array([[6.0], [12.0]]))
    fast = outcomes(correct, 24.0, np.array([[3.0], [6.0]]))
    found = compare(slow, fast, 0.0)
    # Each resample has the same problems in both arms, so the ratio is 2 in all of them.
    assert (found.ratio.value, found.ratio.low, found.ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    assert found.num_problems == 100


def test_reference_passes_cost_their_weight() -> None:
    correct = np.array([[1, 0], [1, 1]])
    seqd = outcomes(correct, 24.0, np.array([[6.0], [12.0]]))
    rcd = outcomes(correct, 24.0, np.array([[4.0], [8.0]]), reference=np.array([[4.0], [8.0]]))
    assert compare(seqd, rcd, 0.5, resamples=10).ratio.value == pytest.approx(1.0)  # 4 + 0.5 x 4 = 6
    assert compare(seqd, rcd, 0.0, resamples=10).ratio.value == pytest.approx(1.5)


def test_gains_are_differences_of_accuracy_at_equal_rates() -> None:
    num = 1000
    rng = np.random.default_rng(0)
    denoise = np.array([[3.0], [6.0], [12.0]])
    easy = rng.random(num)
    base = outcomes([easy < p for p in (0.3, 0.6, 0.9)], 24.0, denoise)
    arm = outcomes([easy < p for p in (0.5, 0.8, 1.0)], 24.0, denoise)
    found = compare(base, arm, 0.0, accuracy_level=0.7)
    rates = [gain.tokens_per_pass for gain in found.gains]
    assert rates == pytest.approx(np.linspace(2, 8, 7)[1:-1].tolist())
    for gain in found.gains:
        assert gain.difference.value == pytest.approx(0.2, abs=0.06)
        low, high = gain.difference.low, gain.difference.high
        assert low is not None and high is not None and low < gain.difference.value < high
        assert high - low < 0.06  # paired: SD of a paired difference of .2 is .0126; unpaired it would be .02
    assert found.ratio.value is not None and found.ratio.value > 1


def test_bootstrap_interval_has_the_width_of_theory() -> None:
    # One binary difference per problem: the SD of its mean is known.
    num, p = 2000, 0.3
    differs = np.arange(num) < p * num
    zeros, rates = np.zeros((2, num)), np.array([[4.0], [12.0]])
    base = outcomes(zeros, 24.0, rates)
    arm = outcomes(np.stack([differs, differs]), 24.0, rates)
    gain = compare(base, arm, 0.0, resamples=4000).gains[0].difference
    sd = math.sqrt(p * (1 - p) / num)
    assert gain.value == pytest.approx(p)
    assert gain.low == pytest.approx(p - 1.96 * sd, abs=0.1 * sd)
    assert gain.high == pytest.approx(p + 1.96 * sd, abs=0.1 * sd)


def test_a_level_that_is_not_crossed_gives_no_number() -> None:
    denoise = np.array([[3.0], [6.0]])
    good, poor = (outcomes(np.full((2, 10), 0.0) + np.array([[a], [b]]), 24.0, denoise) for a, b in ((0, 1), (0, 0)))
    for pair in ((poor, good), (good, poor)):
        ratio = compare(*pair, 0.0, resamples=50).ratio
        assert (ratio.value, ratio.low, ratio.high) == (None, None, None)


def test_ranges_that_do_not_meet_give_no_gains() -> None:
    correct = np.ones((2, 10))
    slow, fast = (outcomes(correct, 24.0, np.array([[a], [2 * a]])) for a in (12.0, 2.0))
    assert compare(slow, fast, 0.0, resamples=10).gains == ()


def test_comparison_is_repeatable_and_needs_the_same_problems() -> None:
    rng = np.random.default_rng(1)
    arms = [outcomes(rng.random((3, 50)) < 0.8, 24.0, np.array([[3.0], [6.0], [12.0]])) for _ in range(2)]
    assert compare(*arms, 0.0, seed=4) == compare(*arms, 0.0, seed=4)
    fewer = outcomes(np.ones((3, 49)), 24.0, 3.0)
    with pytest.raises(UserError, match="same problems"):
        compare(arms[0], fewer, 0.0)


def test_collect_groups_rows_and_refuses_gaps() -> None:
    row = {"correct": True, "tokens": 4, "denoise": 2, "reference": 1, "prefill": 0, "store": 0}
    rows = [{**row, "arm": "a", "threshold": t, "example_id": e} for t in (0.9, 0.5) for e in ("y", "x")]
    found = collect(rows)["a"]
    assert (found.thresholds, found.example_ids, found.correct.shape) == ((0.5, 0.9), ("x", "y"), (2, 2))
    with pytest.raises(UserError, match="every example at every threshold"):
        collect(rows[:-1])
    with pytest.raises(UserError, match="twice"):
        collect([*rows, rows[0]])
