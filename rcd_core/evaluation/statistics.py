"""Paired comparison of two methods: differences of accuracy and of tokens per pass, with bootstrap intervals.

All methods solve the same problems. The bootstrap draws problems and keeps both methods' answers to each together.
Intervals are percentile intervals of 95 % (Efron and Tibshirani 1993, chapter 13).

    outcomes = collect(rows)                                     # outcomes.py
    seqd, rcd = (resample(outcomes[name]) for name in ("seqd", "target/zero"))
    compare(seqd, rcd, accuracy_levels=(0.9,)).levels[0].ratio

Shapes: T thresholds, N problems, R resamples. Row 0 of 1 + R is the original sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from rcd_core.errors import UserError
from rcd_core.evaluation.outcomes import Array, Measure, Outcomes

RESAMPLES = 2000
AUP_ALPHA, AUP_OFFSET = 3.0, 0.05  # d3LLM's penalty, and the accepted drop of accuracy, 5 percentage points
_MIN_DEFINED = 0.95  # an interval needs a value in at least this share of the resamples
_NUM_RATES = 5
_CHUNK = 256  # resamples per batch

Position = Literal["crossed", "above", "below"]


@dataclass(frozen=True)
class Curves:
    """A method's curve on resampled problems: accuracy (1 + R, T), rates (1 + R, T) by measure."""

    example_ids: tuple[str, ...]
    accuracy: Array
    rates: Mapping[Measure, Array]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval. None: undefined (value), or undefined in many resamples (interval)."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Level:
    """Both methods at the same accuracy. ratio: the method's rate / the baseline's (above 1: fewer passes).

    baseline_rate, arm_rate: highest interpolated rate with this accuracy; None if the sweep does not cross it.
    baseline, arm: whether the sweep crosses the accuracy or stays above or below. Fields are keys of results.json.
    """

    accuracy: float
    baseline_rate: float | None
    arm_rate: float | None
    baseline: Position
    arm: Position
    ratio: Estimate


@dataclass(frozen=True)
class Gain:
    """Both methods at the same rate, by interpolation. difference: the method's accuracy - the baseline's."""

    rate: float
    baseline_accuracy: float
    arm_accuracy: float
    difference: Estimate


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """levels: at the requested accuracies. best: at the baseline's highest accuracy over the thresholds, of each
    resample. best_difference: the method's highest accuracy - the baseline's. gains: at evenly spaced rates inside the
    range that both curves cover. aup: the method's - the baseline's.
    """

    measure: Measure
    num_problems: int
    levels: tuple[Level, ...]
    best: Level
    best_difference: Estimate
    gains: tuple[Gain, ...]
    aup: Estimate


def resample(outcomes: Outcomes, resamples: int = RESAMPLES, seed: int = 0) -> Curves:
    """Draw problems with replacement. Methods with equally many problems get the same draws, hence pairs."""
    num_problems = len(outcomes.example_ids)
    generator = np.random.default_rng(seed)
    share = np.full(num_problems, 1.0 / num_problems)
    accuracy: list[Array] = []
    rates: dict[Measure, list[Array]] = {measure: [] for measure in get_args(Measure)}
    sizes = [min(_CHUNK, resamples - first) for first in range(0, resamples, _CHUNK)]
    for times in (np.ones((1, num_problems)), *(generator.multinomial(num_problems, share, size=n) for n in sizes)):
        weights = np.asarray(times, dtype=np.float64)  # (resamples, N): how often each problem was drawn
        accuracy.append(weights @ outcomes.rates.T / num_problems)
        for measure, parts in rates.items():
            parts.append((weights @ outcomes.tokens.T) / (weights @ outcomes.passes(measure).T))
    return Curves(
        outcomes.example_ids,
        np.concatenate(accuracy),
        {measure: np.concatenate(parts) for measure, parts in rates.items()},
    )


def compare(
    baseline: Curves,
    method: Curves,
    *,
    accuracy_levels: Sequence[float] = (0.9,),
    best_accuracy: float | None = None,
    measure: Measure = "tokens_per_pass",
) -> Comparison:
    """best_accuracy: of all methods, for `aup` (None: of these two). Raises UserError if the problems or the number of
    resamples differ."""
    if baseline.example_ids != method.example_ids or len(baseline.accuracy) != len(method.accuracy):
        raise UserError("results: the two arms have different example_id, so they cannot be compared in pairs")
    if best_accuracy is None:
        best_accuracy = float(max(baseline.accuracy[0].max(), method.accuracy[0].max()))
    gains = []
    for rate in _shared_rates(baseline.rates[measure][0], method.rates[measure][0]):
        base, other = (crossing(curves.accuracy, curves.rates[measure], rate) for curves in (baseline, method))
        gains.append(Gain(rate, float(base[0]), float(other[0]), estimate(other - base)))
    areas = [aup(curves.rates[measure], curves.accuracy, best_accuracy) for curves in (baseline, method)]
    return Comparison(
        measure=measure,
        num_problems=len(method.example_ids),
        levels=tuple(_level(baseline, method, measure, np.asarray(level)) for level in accuracy_levels),
        best=_level(baseline, method, measure, baseline.accuracy.max(axis=1)),
        best_difference=estimate(method.accuracy.max(axis=1) - baseline.accuracy.max(axis=1)),
        gains=tuple(gains),
        aup=estimate(areas[1] - areas[0]),
    )


def crossing(values: Array, along: Array, level: float | Array) -> Array:
    """The largest `values` (..., T) at which `along` (..., T) crosses `level` (...); NaN if it never does.

    Piecewise linear between neighbouring thresholds. crossing(rate, accuracy, 0.9) is the highest rate at 90 %
    accuracy, crossing(accuracy, rate, 4) the accuracy at rate 4.
    """
    best = np.where(along[..., 0] == level, values[..., 0], np.nan)
    for t in range(along.shape[-1] - 1):
        a0, a1 = along[..., t], along[..., t + 1]
        v0, v1 = values[..., t], values[..., t + 1]
        flat = a0 == a1
        share = np.where(flat, 0.0, (level - a0) / np.where(flat, 1.0, a1 - a0))
        value = np.where(flat, np.maximum(v0, v1), v0 + share * (v1 - v0))
        inside = (np.minimum(a0, a1) <= level) & (level <= np.maximum(a0, a1))
        best = np.fmax(best, np.where(inside, value, np.nan))
    return best


def aup(
    rate: Array, accuracy: Array, best_accuracy: float, alpha: float = AUP_ALPHA, offset: float = AUP_OFFSET
) -> Array:
    """(..., T) rates and accuracies -> (...) accuracy under parallelism (d3LLM, arXiv 2601.07568):

        AUP = rho_1 y_1 + 1/2 sum_{i > 1} (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1}))
        W(y) = min(exp(-alpha (1 - y / y_max)), 1)

    over the points with y_i >= y_1 - offset in ascending order of the rate rho (its authors' rho: tokens per forward).
    y: accuracy in %; y_max: best_accuracy, the highest of all methods.
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
    """(1 + R,) -> the first value with the percentile interval of the rest."""
    value, samples = float(values[0]), values[1:]
    if math.isnan(value):
        return Estimate(None, None, None)
    defined = samples[~np.isnan(samples)]
    if not len(defined) or len(defined) < _MIN_DEFINED * len(samples):
        return Estimate(value, None, None)
    low, high = np.quantile(defined, [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def _level(baseline: Curves, method: Curves, measure: Measure, level: Array) -> Level:
    """level: (), or (1 + R,) with one for each resample."""
    rates = [crossing(curves.rates[measure], curves.accuracy, level) for curves in (baseline, method)]
    accuracy = float(level.flat[0])
    return Level(
        accuracy=accuracy,
        baseline_rate=None if math.isnan(rates[0][0]) else float(rates[0][0]),
        arm_rate=None if math.isnan(rates[1][0]) else float(rates[1][0]),
        baseline=_position(baseline, accuracy),
        arm=_position(method, accuracy),
        ratio=estimate(rates[1] / rates[0]),
    )


def _position(curves: Curves, level: float) -> Position:
    """Whether a sweep crosses the accuracy `level` or lies on one side of it."""
    accuracy = curves.accuracy[0]
    if accuracy.min() > level:
        return "above"
    return "below" if accuracy.max() < level else "crossed"


def _shared_rates(baseline: Array, method: Array) -> list[float]:
    """Rates strictly inside both ranges: at the ends of a range about half of the resamples have no value."""
    low, high = max(baseline.min(), method.min()), min(baseline.max(), method.max())
    return np.linspace(low, high, _NUM_RATES + 2)[1:-1].round(3).tolist() if low < high else []
