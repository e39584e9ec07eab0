"""The scale of alpha: what entropies the reference's signals have, and the T_res at which the target's own match them.

In training alpha comes from the reference, in decoding from the target's own predictions at T_res (Algorithm 2).
T_res is chosen so that both are distributed alike. Distance: the 1-Wasserstein distance of alpha within ten bins of the
masking ratio, averaged over the bins. It is the mean change of alpha that would make one distribution the other, in
units of alpha: it notices a shift as well as a change of shape, does not saturate where two histograms hardly overlap
(as KL and total variation do) and depends on no width of bins of alpha. Within bins of the masking ratio, because alpha
falls with it, and training draws the ratios evenly while decoding passes through them at its own pace: distributions
over all ratios together could agree where no two of them do. A bin weighs as much as decoding at T_res = 1 uses it.

On which inputs the reference is asked matters more than the distance. Match "decoding", the default: on the very inputs
that the target's decoding reaches. Match "training": on examples under training's random noise. Decoding commits what
is certain, so its masked positions are the uncertain ones among as many at random; the match "training" makes T_res
undo that selection. In the demo it chooses 0.59 where "decoding" chooses 1.41; at 90 % accuracy they make 0.85 (95 %
interval 0.81 to 0.88) and 1.13 (1.07 to 1.18) times the tokens per forward of T_res = 1 (1,024 test problems, one
target, zero start: tests/benchmarks/residual_temperature.py). At one and the same threshold a larger T_res means more
tokens per forward and a lower accuracy: thresholds found at T_res = 1 are to be found anew.

Numbers only; what decodes is self_loop.py. Shapes: N positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError

Match = Literal["decoding", "training"]
NUM_BINS = 2048
MAX_NATS = 16.0  # above ln of any vocabulary in use (ln 151,936 = 11.9); a bin is 1/128 nat


NUM_SHARES = 10  # bins of the masking ratio, and of progress
LEAST_POSITIONS = 20  # of a bin that is compared: the distance of two small samples is mostly chance
_OCTAVE = 8  # steps of the search; the finest is 9 %
_COARSE, _LIMIT = _OCTAVE // 2, 4 * _OCTAVE  # T_res from 1/2 to 2, where the best is at an end up to 1/16 and 16

Floats = NDArray[np.floating[Any]]


def entropy_histogram(entropies: NDArray[np.float32]) -> NDArray[np.int64]:
    """(N,) nats -> (NUM_BINS,) counts."""
    bins = np.clip(entropies.astype(np.float64) * (NUM_BINS / MAX_NATS), 0, NUM_BINS - 1).astype(np.int64)
    return np.bincount(bins, minlength=NUM_BINS)


def entropy_quantile(histogram: Sequence[int], quantile: float) -> float:
    """The entropy in nats below which a share `quantile` lies, linear within a bin: h of calibrated alpha."""
    counts = np.asarray(histogram, dtype=np.int64)
    total = int(counts.sum())
    if not total:
        raise UserError("the entropy histogram of the signals is empty; run the stage `signals` again")
    sums = np.cumsum(counts)
    wanted = quantile * total
    index = int(np.searchsorted(sums, wanted, side="left"))
    inside = (wanted - (sums[index] - counts[index])) / counts[index]
    value = (index + inside) * MAX_NATS / NUM_BINS
    return max(float(value), math.ulp(1.0))


# -- T_res


class Alphas(NamedTuple):
    """alpha (N,) of predictions that are residuals, and the masking ratio (N,) of the input each was made on."""

    alpha: Floats
    masked_share: Floats

    @property
    def bins(self) -> NDArray[np.int64]:
        """(N,) from 0, nearly all committed, to NUM_SHARES - 1, all masked."""
        return share_bins(self.masked_share)

    @property
    def counts(self) -> NDArray[np.int64]:
        """(NUM_SHARES,) positions of each bin."""
        return np.bincount(self.bins, minlength=NUM_SHARES)

    def inside(self, number: int) -> Floats:
        found: Floats = self.alpha[self.bins == number]
        return found


def share_bins(shares: Floats) -> NDArray[np.int64]:
    """(N,) shares in (0, 1] -> (N,) bins; an upper edge belongs to the bin below it."""
    above = np.ceil(np.asarray(shares, dtype=np.float64) * NUM_SHARES - 1e-9).astype(np.int64)
    return np.asarray(np.clip(above - 1, 0, NUM_SHARES - 1))


def wasserstein(a: Floats, b: Floats) -> float:
    """1-Wasserstein distance of two samples, of any sizes: the area between their distribution functions."""
    values = np.sort(np.concatenate([a, b]).astype(np.float64))
    below = [np.searchsorted(np.sort(s), values[:-1], side="right") / len(s) for s in (a, b)]
    return float((np.abs(below[0] - below[1]) * np.diff(values)).sum())


def alpha_distance(reference: Alphas, own: Alphas, weights: NDArray[np.number[Any]]) -> float:
    """The module's distance. weights (NUM_SHARES,) of the bins; one with fewer than LEAST_POSITIONS on either side
    does not count. UserError where none is left."""
    usable = np.minimum(reference.counts, own.counts) >= LEAST_POSITIONS
    bins = np.flatnonzero(usable & (weights > 0)).tolist()
    if not bins:
        raise UserError(
            f"too few residuals to compare: no masking ratio has {LEAST_POSITIONS} of both reference and target; "
            "raise num_examples, or confidence_threshold, so that decoding makes more passes"
        )
    found = [wasserstein(reference.inside(i), own.inside(i)) for i in bins]
    return float(np.average(found, weights=weights[bins]))


def search_temperature(distance: Callable[[float], float]) -> list[tuple[float, float]]:
    """(T_res, distance) of every temperature tried, ascending; 1 is among them. A grid in ln T_res, which grows where
    its best is at an end, then halved steps around the best. `nearest` says which one wins."""
    found: dict[int, float] = {}

    def look(step: int) -> None:
        if step not in found:
            found[step] = distance(temperature(step))

    def best() -> int:
        return min(found, key=lambda step: (found[step], abs(step), step))

    for step in range(-_LIMIT // 4, _LIMIT // 4 + 1, _COARSE):
        look(step)
    while best() in (min(found), max(found)) and abs(best()) < _LIMIT:
        look(best() + int(math.copysign(_COARSE, best())))
    width = _COARSE // 2
    while width:
        middle = best()
        look(middle - width)
        look(middle + width)
        width //= 2
    return [(temperature(step), found[step]) for step in sorted(found)]


def temperature(step: int) -> float:
    """Eighths of an octave -> T_res, rounded as it is stored."""
    return round(float(2.0 ** (step / _OCTAVE)), 4)


def nearest(curve: Sequence[tuple[float, float]]) -> float:
    """The T_res of the smallest distance; of equals the one closest to 1."""
    return min(curve, key=lambda point: (point[1], abs(math.log(point[0]))))[0]
