"""pass@1 over k samples: against closed forms, and against what repeating the experiment shows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rcd_core.errors import UserError
from rcd_core.evaluation.pass_at_1 import pass_at_1


def test_one_sample_is_a_binomial_proportion() -> None:
    found = pass_at_1([[True]] * 30 + [[False]] * 10)
    p = 0.75
    assert found.mean == p and (found.num_problems, found.num_samples) == (40, 1)
    assert found.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 39))  # s^2 = p (1 - p) N / (N - 1)


def test_two_problems_by_hand() -> None:
    found = pass_at_1([[1, 1, 1, 1], [1, 0, 0, 0]])
    assert found.mean == pytest.approx(5 / 8)
    assert found.standard_error == pytest.approx((1 - 1 / 4) / 2)  # |m_1 - m_2| / 2


def test_equal_rates_have_no_error_and_one_problem_none() -> None:
    assert pass_at_1([[1, 0], [0, 1]]).standard_error == 0.0
    assert pass_at_1([[1, 0, 0]]).standard_error is None
    assert pass_at_1([[1, 0, 0]]).mean == pytest.approx(1 / 3)


def test_samples_of_a_problem_are_not_counted_as_independent() -> None:
    once = np.array([[1], [0], [1], [1], [0]])
    again = np.repeat(once, 16, axis=1)
    assert pass_at_1(once).standard_error == pytest.approx(pass_at_1(again).standard_error)


def test_the_error_is_the_scatter_over_drawn_problems() -> None:
    generator = np.random.default_rng(0)
    runs = [pass_at_1(generator.random((60, 4)) < generator.beta(0.5, 0.5, (60, 1))) for _ in range(2000)]
    scatter = np.std([run.mean for run in runs])
    mean_square = np.mean([run.standard_error**2 for run in runs if run.standard_error is not None])
    assert math.sqrt(mean_square) == pytest.approx(scatter, rel=0.06)  # 2,000 runs: 1.6 % SD of the scatter


@pytest.mark.parametrize("correct", [[], [[]], [True, False], [[1], [1, 0]], [[0.5]], [["x"]]])
def test_anything_else_is_refused(correct: object) -> None:
    with pytest.raises(UserError, match="correct"):
        pass_at_1(correct)  # type: ignore[arg-type]
