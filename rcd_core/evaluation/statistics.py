"""Statistics of decoding: whether two arms differ in accuracy and in tokens per pass, and how sure that is.

All arms solve the same problems, so they are compared in pairs: the bootstrap draws problems and keeps both arms'
answers to each together. Intervals are percentile intervals (Efron and Tibshirani 1993, chapter 13) of 95 %.

    arms = collect(rows)                                     # outcomes.py: rows, outcomes, curves
    seqd, rcd = (resample(arms[name]) for name in ("seqd", "target/zero"))
    compare(seqd, rcd, accuracy_levels=(0.9,)).levels[0].ratio

Shapes: T thresholds, N problems, R resamples; row 0 of 1 + R is the problems as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from rcd_core.errors import UserError
from rcd_core.evaluation.outcomes import Array, Measure, Outcomes, Point, collect, curve, wilson_interval

__all__ = [
    "AUP_ALPHA",
    "AUP_OFFSET",
    "RESAMPLES",
    "Comparison",
    "Curves",
    "Estimate",
    "Gain",
    "Level",
    "Measure",
    "Outcomes",
    "Point",
    "aup",
    "collect",
    "compare",
    "crossing",
    "curve",
    "estimate",
    "resample",
    "wilson_interval",
]

RESAMPLES = 2000
AUP_ALPHA, AUP_OFFSET = 3.0, 0.05  # d3LLM's penalty, and its 5 points that accuracy may fall
_LEAST_DEFINED = 0.95  # an interval is given only where this share of the resamples has a value
_NUM_RATES = 5
_CHUNK = 256  # resamples drawn at once

Reached = Literal["crossed", "above", "below"]


@dataclass(frozen=True)
class Curves:
    """An arm's curve on resampled problems: accuracy (1 + R, T), rates (1 + R, T) by measure."""

    example_ids: tuple[str, ...]
    accuracy: Array
    rates: Mapping[Measure, Array]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval. None: not defined (value), or in too few resamples (interval)."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Level:
    """Both arms at the same accuracy. ratio: rate of the arm over the baseline's (above 1: fewer passes).

    baseline_rate, arm_rate: the fastest, by interpolation, at which a sweep has this accuracy; None where it does not
    cross it, being above or below at all thresholds.
    """

    accuracy: float
    baseline_rate: float | None
    arm_rate: float | None
    baseline: Reached
    arm: Reached
    ratio: Estimate


@dataclass(frozen=True)
class Gain:
    """Both arms at the same rate, by interpolation. difference: in accuracy, the arm's minus the baseline's."""

    rate: float
    baseline_accuracy: float
    arm_accuracy: float
    difference: Estimate


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """levels: at the accuracies asked for. best: at the baseline's best accuracy, its highest over the thresholds,
    which each resample takes anew. gains: at rates evenly spaced inside the range that both curves cover. aup: the
    arm's minus the baseline's."""

    measure: Measure
    num_problems: int
    levels: tuple[Level, ...]
    best: Level
    gains: tuple[Gain, ...]
    aup: Estimate


def resample(outcomes: Outcomes, resamples: int = RESAMPLES, seed: int = 0) -> Curves:
    """Draw problems with replacement. Arms of as many problems get the same draws from the same seed: pairs."""
    num_problems = len(outcomes.example_ids)
    generator = np.random.default_rng(seed)
    share = np.full(num_problems, 1.0 / num_problems)
    accuracy: list[Array] = []
    rates: dict[Measure, list[Array]] = {measure: [] for measure in get_args(Measure)}
    sizes = [min(_CHUNK, resamples - first) for first in range(0, resamples, _CHUNK)]
    for times in (np.ones((1, num_problems)), *(generator.multinomial(num_problems, share, size=n) for n in sizes)):
        drawn = np.asarray(times, dtype=np.float64)  # how often each problem is in
        accuracy.append(drawn @ outcomes.rates.T / num_problems)
        for measure, parts in rates.items():
            parts.append((drawn @ outcomes.tokens.T) / (drawn @ outcomes.passes(measure).T))
    return Curves(
        outcomes.example_ids,
        np.concatenate(accuracy),
        {measure: np.concatenate(parts) for measure, parts in rates.items()},
    )


def compare(
    baseline: Curves,
    arm: Curves,
    *,
    accuracy_levels: Sequence[float] = (0.9,),
    best_accuracy: float | None = None,
    measure: Measure = "tokens_per_pass",
) -> Comparison:
    """best_accuracy: of all arms, for `aup` (None: of these two). UserError where the two did not decode the same
    problems, or were not resampled alike."""
    if baseline.example_ids != arm.example_ids or len(baseline.accuracy) != len(arm.accuracy):
        raise UserError("results: the two arms did not decode the same problems, so they cannot be compared in pairs")
    if best_accuracy is None:
        best_accuracy = float(max(baseline.accuracy[0].max(), arm.accuracy[0].max()))
    gains = []
    for rate in _shared_rates(baseline.rates[measure][0], arm.rates[measure][0]):
        base, own = (crossing(curves.accuracy, curves.rates[measure], rate) for curves in (baseline, arm))
        gains.append(Gain(rate, float(base[0]), float(own[0]), estimate(own - base)))
    areas = [aup(curves.rates[measure], curves.accuracy, best_accuracy) for curves in (baseline, arm)]
    return Comparison(
        measure=measure,
        num_problems=len(arm.example_ids),
        levels=tuple(_level(baseline, arm, measure, np.asarray(level)) for level in accuracy_levels),
        best=_level(baseline, arm, measure, baseline.accuracy.max(axis=1)),
        gains=tuple(gains),
        aup=estimate(areas[1] - areas[0]),
    )


def crossing(values: Array, along: Array, level: float | Array) -> Array:
    """Walk the sweep from point to point: the largest `values` (..., T) where `along` (..., T) crosses `level` (...).

    Piecewise linear between neighbouring thresholds; NaN where the sweep never crosses the level. So
    crossing(rate, accuracy, 0.9) is the fastest rate at 90 % accuracy, crossing(accuracy, rate, 4) the accuracy at 4.
    """
    best = np.where(along[..., 0] == level, values[..., 0], np.nan)
    for t in range(along.shape[-1] - 1):
        a0, a1 = along[..., t], along[..., t + 1]
        v0, v1 = values[..., t], values[..., t + 1]
        flat = a0 == a1
        share = np.where(flat, 0.0, (level - a0) / np.where(flat, 1.0, a1 - a0))
        found = np.where(flat, np.maximum(v0, v1), v0 + share * (v1 - v0))
        inside = (np.minimum(a0, a1) <= level) & (level <= np.maximum(a0, a1))
        best = np.fmax(best, np.where(inside, found, np.nan))
    return best


def aup(
    rate: Array, accuracy: Array, best_accuracy: float, alpha: float = AUP_ALPHA, offset: float = AUP_OFFSET
) -> Array:
    """(..., T) rates and accuracies -> (...) accuracy under parallelism (d3LLM, arXiv 2601.07568):

        AUP = rho_1 y_1 + 1/2 sum_{i > 1} (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1}))
        W(y) = min(exp(-alpha (1 - y / y_max)), 1)

    over the points in ascending order of the rate rho with y_i >= y_1 - offset; y: accuracy in %, y_max: best_accuracy,
    the highest of all arms. (Its authors' rho is tokens per forward.) An arm of constant accuracy y_max has y_max times
    its fastest rate.
    """
    order = np.argsort(rate, axis=-1, kind="stable")
    rho, y = np.take_along_axis(rate, order, -1), np.take_along_axis(accuracy, order, -1)
    height = 100 * y * np.minimum(np.exp(-alpha * (1 - y / best_accuracy)), 1.0) if best_accuracy else 0 * y
    area = 100 * rho[..., 0] * y[..., 0]
    last_rho, last_height = rho[..., 0], height[..., 0]
    for t in range(1, rho.shape[-1]):
        kept = y[..., t] >= y[..., 0] - offset
        area = area + np.where(kept, (rho[..., t] - last_rho) * (height[..., t] + last_height) / 2, 0.0)
        last_rho, last_height = np.where(kept, rho[..., t], last_rho), np.where(kept, height[..., t], last_height)
    return np.asarray(area)


def estimate(values: Array) -> Estimate:
    """(1 + R,) -> the first value with the percentile interval of the others."""
    value, samples = float(values[0]), values[1:]
    if math.isnan(value):
        return Estimate(None, None, None)
    defined = samples[~np.isnan(samples)]
    if not len(defined) or len(defined) < _LEAST_DEFINED * len(samples):
        return Estimate(value, None, None)
    low, high = np.quantile(defined, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def _level(baseline: Curves, arm: Curves, measure: Measure, level: Array) -> Level:
    """level: (), or (1 + R,) where each resample has its own."""
    rates = [crossing(curves.rates[measure], curves.accuracy, level) for curves in (baseline, arm)]
    accuracy = float(level.flat[0])
    return Level(
        accuracy=accuracy,
        baseline_rate=None if math.isnan(rates[0][0]) else float(rates[0][0]),
        arm_rate=None if math.isnan(rates[1][0]) else float(rates[1][0]),
        baseline=_reached(baseline, accuracy),
        arm=_reached(arm, accuracy),
        ratio=estimate(rates[1] / rates[0]),
    )


def _reached(curves: Curves, level: float) -> Reached:
    """A sweep that does not cross a level lies on one side of it."""
    seen = curves.accuracy[0]
    if seen.min() > level:
        return "above"
    return "below" if seen.max() < level else "crossed"


def _shared_rates(baseline: Array, arm: Array) -> list[float]:
    """Rates strictly inside both ranges: at the ends of a range half of the resamples would have no value."""
    low, high = max(baseline.min(), arm.min()), min(baseline.max(), arm.max())
    return np.linspace(low, high, _NUM_RATES + 2)[1:-1].round(3).tolist() if low < high else []
