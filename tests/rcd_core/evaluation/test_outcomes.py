"""Rows to outcomes, pass@1 and curves, against hand calculations and closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from rcd_core.errors import UserError
from rcd_core.evaluation.outcomes import Z_95, collect, curve, pass_at_1, wilson_interval

ROW: dict[str, Any] = {
    "arm": "a", "threshold": 0.5, "correct": True, "tokens": 4, "denoise": 2, "reference": 0, "prefill": 1, "store": 0,
}  # fmt: skip


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


def test_wilson_interval_covers_what_it_says() -> None:
    """Exactly, by the binomial probabilities; Wilson's is 95 % on average over p, not for every p."""
    n = 50
    intervals = [wilson_interval(k, n) for k in range(n + 1)]
    covered = [
        sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k, (low, high) in enumerate(intervals) if low <= p <= high)
        for p in np.linspace(0.05, 0.95, 91)
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.005) and min(covered) > 0.91


def test_curve_by_hand() -> None:
    rows = [
        {**ROW, "example_id": str(i), "correct": i != 1, "tokens": tokens, "denoise": denoise, "reference": 1}
        | {"reference_flops_weight": 0.25, "reference_weight": 0.5, "store": 2, "seconds": 0.5}
        for i, (tokens, denoise) in enumerate(((10, 5), (20, 5), (30, 5), (40, 10)))
    ]
    (point,) = curve(collect(rows)["a"])
    assert (point.num_problems, point.num_samples, point.accuracy) == (4, 1, 0.75)
    assert point.tokens_per_forward == 100 / 25  # a ratio of sums, not the mean of 2, 4, 6 and 4
    assert point.tokens_per_pass == 100 / 26 and point.tokens_per_pass_by_parameters == 100 / 27
    assert point.tokens_per_second == 100 / 2
    assert (point.mean_denoise, point.mean_reference, point.mean_store) == (6.25, 1, 2)
    assert (point.accuracy_low, point.accuracy_high) == wilson_interval(3, 4)
    assert point.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_samples_are_averaged_within_their_problem() -> None:
    """Rates 1, 1/2, 0: mean 1/2, standard error sqrt(1/4 / 3); the six answers are not six problems."""
    correct = {"x": (1, 1), "y": (1, 0), "z": (0, 0)}
    rows = [
        {**ROW, "example_id": e, "sample": s, "correct": bool(c), "tokens": 4 + 4 * s}
        for e, answers in correct.items()
        for s, c in enumerate(answers)
    ]
    outcomes = collect(rows)["a"]
    assert outcomes.correct.shape == (1, 3, 2) and outcomes.rates.tolist() == [[1, 0.5, 0]]
    (point,) = curve(outcomes)
    assert (point.num_problems, point.num_samples, point.accuracy) == (3, 2, 0.5)
    assert point.accuracy_by_sample == pytest.approx((2 / 3, 1 / 3))
    assert point.standard_error == pytest.approx(math.sqrt(0.25 / 3))
    assert point.accuracy_low == max(0.0, 0.5 - Z_95 * math.sqrt(0.25 / 3))
    assert (point.mean_tokens, point.tokens_per_pass) == (6, 3)
    assert point.tokens_per_second is None


def test_collect_groups_rows_and_refuses_gaps() -> None:
    rows = [{**ROW, "threshold": t, "example_id": e} for t in (0.9, 0.5) for e in ("y", "x")]
    outcomes = collect(rows)["a"]
    assert (outcomes.thresholds, outcomes.example_ids, outcomes.correct.shape) == ((0.5, 0.9), ("x", "y"), (2, 2, 1))
    with pytest.raises(UserError, match="'a' has 3 rows"):
        collect(rows[:-1])
    with pytest.raises(UserError, match="'a'.*'y'.*0.9"):
        collect([*rows, rows[0]])
    with pytest.raises(UserError, match="reference_flops_weight"):
        collect([{**ROW, "example_id": "x", "reference": 1, "reference_weight": 0.5}])


# -- pass@1


def test_one_sample_is_a_binomial_proportion() -> None:
    mean, error = pass_at_1(np.repeat([[1.0], [0.0]], [30, 10], axis=0))
    assert mean == 0.75 and error == pytest.approx(math.sqrt(0.75 * 0.25 / 39))  # s^2 = p (1 - p) N / (N - 1)


def test_pass_at_1_by_hand() -> None:
    mean, error = pass_at_1(np.array([[1, 1, 1, 1], [1, 0, 0, 0]]))
    assert mean == pytest.approx(5 / 8) and error == pytest.approx((1 - 1 / 4) / 2)  # |m_1 - m_2| / 2
    assert pass_at_1(np.array([[1, 0], [0, 1]]))[1] == 0.0
    assert pass_at_1(np.array([[1, 0, 0]])) == (pytest.approx(1 / 3), None)
    with pytest.raises(UserError, match="correct"):
        pass_at_1(np.array([[0.5]]))


def test_samples_of_a_problem_are_not_counted_as_independent() -> None:
    once = np.array([[1], [0], [1], [1], [0]])
    assert pass_at_1(once)[1] == pytest.approx(pass_at_1(np.repeat(once, 16, axis=1))[1])


def test_the_error_is_the_scatter_over_drawn_problems() -> None:
    generator = np.random.default_rng(0)
    draws = (generator.random((60, 4)) < generator.beta(0.5, 0.5, (60, 1)) for _ in range(2000))
    means, errors = np.array([pass_at_1(correct) for correct in draws], dtype=float).T
    assert math.sqrt(np.mean(errors**2)) == pytest.approx(
        np.std(means), rel=0.06
    )  # 2,000 runs: 1.6 % SD of the scatter
