"""pass@1 from k samples per problem: its mean, and how much it would scatter over other problems.

With c_ij = 1 where sample j of problem i is right, m_i = (1/k) sum_j c_ij is problem i's rate of success, and

    pass@1 = (1/N) sum_i m_i        standard error = sqrt( sum_i (m_i - pass@1)^2 / (N (N - 1)) )

This is the estimator of Chen et al. 2021 (arXiv 2107.03374, equation 1) at one draw. The error is that of a mean of N
independent problems: the scatter of the samples is within the m_i already, so nothing is added for it, and the N k
answers are never counted as independent. Errors in percentage points are 100 times these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rcd_core.errors import UserError


@dataclass(frozen=True, slots=True)
class PassAt1:
    """mean and standard_error as fractions of 1; standard_error is None for a single problem."""

    mean: float
    standard_error: float | None
    num_problems: int
    num_samples: int


def pass_at_1(correct: ArrayLike) -> PassAt1:
    """correct: (N, k), a row per problem, true where a sample is right. UserError for another shape, or for nothing."""
    try:
        table = np.asarray(correct, dtype=np.float64)
    except ValueError as error:
        raise UserError(f"correct: {error}; every problem needs the same number of samples") from error
    if table.ndim != 2 or not table.size:
        raise UserError(f"correct has shape {table.shape}; it must be (problems, samples), at least one of each")
    if not np.isin(table, (0.0, 1.0)).all():
        raise UserError("correct holds other values than true and false")
    num_problems, num_samples = table.shape
    rates = table.mean(axis=1)
    error_of_mean = float(rates.std(ddof=1)) / math.sqrt(num_problems) if num_problems > 1 else None
    return PassAt1(float(rates.mean()), error_of_mean, num_problems, num_samples)
