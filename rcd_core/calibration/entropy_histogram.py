"""Histograms of the entropies of reference signals, and their quantiles: the scale h of calibrated alpha."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError

NUM_BINS = 2048
MAX_NATS = 16.0  # above ln of any vocabulary in use (ln 151,936 = 11.9); a bin is 1/128 nat


def entropy_histogram(entropies: NDArray[np.float32]) -> NDArray[np.int64]:
    """(N,) nats -> (NUM_BINS,) counts."""
    bins = np.clip(entropies.astype(np.float64) * (NUM_BINS / MAX_NATS), 0, NUM_BINS - 1).astype(np.int64)
    return np.bincount(bins, minlength=NUM_BINS)


def entropy_quantile(histogram: Sequence[int], quantile: float) -> float:
    """The quantile in nats, by linear interpolation within a bin. Raises UserError for an empty histogram."""
    counts = np.asarray(histogram, dtype=np.int64)
    total = int(counts.sum())
    if not total:
        raise UserError("the entropy histogram of the signals is empty; run the stage `signals` again")
    sums = np.cumsum(counts)
    rank = quantile * total
    index = int(np.searchsorted(sums, rank, side="left"))
    inside = (rank - (sums[index] - counts[index])) / counts[index]
    value = (index + inside) * MAX_NATS / NUM_BINS
    return max(float(value), math.ulp(1.0))
