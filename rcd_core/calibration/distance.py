"""Distance between distributions of alpha, and the search for the T_res that minimises it.

In training alpha comes from the reference, in decoding from the target's own predictions at T_res (Algorithm 2). T_res
is chosen so that both are distributed alike. The distance is the 1-Wasserstein distance of alpha, the mean change of
alpha that turns one distribution into the other. It responds to shifts and to changes of shape, and unlike KL and total
variation it does not saturate when distributions hardly overlap.

The distance is computed within ten bins of the masking ratio and averaged with weights of decoding at T_res = 1. Alpha
falls with the masking ratio, which training draws uniformly and decoding does not, so distributions over all ratios
could agree although they differ within every bin.

Match "decoding" (default): the reference predicts on the inputs that the target's decoding reaches. Match "training":
on examples under training noise. Decoding commits certain positions first, so its masked positions are less certain
than random ones, and "training" makes T_res undo that selection. Results: tests/benchmarks/README.md, "T_res".

Shapes: N positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError

Match = Literal["decoding", "training"]
NUM_SHARES = 10  # bins of the masking ratio, and of progress
MIN_POSITIONS = 20  # per compared bin: the distance of smaller samples is mostly chance
_OCTAVE = 8  # steps of the search per factor of 2; the finest step is 9 %
_COARSE, _LIMIT = _OCTAVE // 2, 4 * _OCTAVE  # starts with T_res from 1/2 to 2; extends to 1/16 and 16 if needed

Floats = NDArray[np.floating[Any]]


class Alphas(NamedTuple):
    """alpha (N,) of predictions that become residuals, and masked_share (N,), the masking ratio of their inputs."""

    alpha: Floats
    masked_share: Floats

    @property
    def bins(self) -> NDArray[np.int64]:
        """(N,) from 0, nearly all committed, to NUM_SHARES - 1, all masked."""
        return share_bins(self.masked_share)

    @property
    def counts(self) -> NDArray[np.int64]:
        """(NUM_SHARES,) positions per bin."""
        return np.bincount(self.bins, minlength=NUM_SHARES)

    def of_bin(self, index: int) -> Floats:
        values: Floats = self.alpha[self.bins == index]
        return values


def share_bins(shares: Floats) -> NDArray[np.int64]:
    """(N,) shares in (0, 1] -> (N,) bins. An upper edge belongs to the lower bin."""
    upper = np.ceil(np.asarray(shares, dtype=np.float64) * NUM_SHARES - 1e-9).astype(np.int64)
    return np.asarray(np.clip(upper - 1, 0, NUM_SHARES - 1))


def wasserstein(a: Floats, b: Floats) -> float:
    """1-Wasserstein distance of two samples of any sizes: the area between their distribution functions."""
    values = np.sort(np.concatenate([a, b]).astype(np.float64))
    cdfs = [np.searchsorted(np.sort(s), values[:-1], side="right") / len(s) for s in (a, b)]
    return float((np.abs(cdfs[0] - cdfs[1]) * np.diff(values)).sum())


def alpha_distance(reference: Alphas, target: Alphas, weights: NDArray[np.number[Any]]) -> float:
    """The distance of this module. weights (NUM_SHARES,): of the bins.

    Bins with fewer than MIN_POSITIONS on either side are omitted. Raises UserError if none is left.
    """
    usable = np.minimum(reference.counts, target.counts) >= MIN_POSITIONS
    bins = np.flatnonzero(usable & (weights > 0)).tolist()
    if not bins:
        raise UserError(
            f"too few residuals to compare: no masking ratio has {MIN_POSITIONS} of both reference and target; "
            "raise num_examples, or confidence_threshold, so that decoding makes more passes"
        )
    distances = [wasserstein(reference.of_bin(i), target.of_bin(i)) for i in bins]
    return float(np.average(distances, weights=weights[bins]))


def search_temperature(distance: Callable[[float], float]) -> list[tuple[float, float]]:
    """Minimise `distance` over T_res -> (T_res, distance) of all evaluations, ascending, 1 included.

    A grid in ln T_res, extended while its best point is at an end; then the steps around the best point are halved.
    """
    results: dict[int, float] = {}

    def evaluate(step: int) -> None:
        if step not in results:
            results[step] = distance(temperature(step))

    def best() -> int:
        return min(results, key=lambda step: (results[step], abs(step), step))

    for step in range(-_LIMIT // 4, _LIMIT // 4 + 1, _COARSE):
        evaluate(step)
    while best() in (min(results), max(results)) and abs(best()) < _LIMIT:
        evaluate(best() + int(math.copysign(_COARSE, best())))
    width = _COARSE // 2
    while width:
        middle = best()
        evaluate(middle - width)
        evaluate(middle + width)
        width //= 2
    return [(temperature(step), results[step]) for step in sorted(results)]


def temperature(step: int) -> float:
    """Eighths of an octave -> T_res, rounded as stored."""
    return round(float(2.0 ** (step / _OCTAVE)), 4)


def best_temperature(curve: Sequence[tuple[float, float]]) -> float:
    """The T_res of the smallest distance; among equals the one closest to 1."""
    return min(curve, key=lambda point: (point[1], abs(math.log(point[0]))))[0]
