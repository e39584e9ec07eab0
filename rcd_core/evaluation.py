"""Statistics of decoding: accuracy against tokens per pass, and whether two arms differ.

An arm is one model decoded in one way over a sweep of confidence thresholds; all arms solve the same problems, so
arms are compared in pairs: the bootstrap draws problems and keeps both arms' results of each together.

Shapes: T thresholds, N problems, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError

Array = NDArray[np.float64]
Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
_LEAST_DEFINED = 0.95  # an interval is given only where this share of the resamples has a value
NUM_RATES = 5
_CHUNK = 256  # resamples held at once


@dataclass(frozen=True)
class Outcomes:
    """One arm's results. correct, tokens and the passes are (T, N), thresholds (T,) ascending, example_ids (N,).

    tokens: generated up to the end of the answer (infill: filled). denoise: target passes that choose tokens;
    prefill and store: target passes that only fill the cache; reference: passes of the reference model.
    """

    thresholds: tuple[float, ...]
    example_ids: tuple[str, ...]
    correct: Array
    tokens: Array
    denoise: Array
    reference: Array
    prefill: Array
    store: Array

    def cost(self, reference_weight: float) -> Array:
        """(T, N) passes that produce tokens, a reference pass counted as `reference_weight` target passes."""
        return self.denoise + reference_weight * self.reference


@dataclass(frozen=True)
class Point:
    """One arm at one threshold. Accuracy with its Wilson 95 % interval; the rates are ratios of sums over problems.

    tokens_per_forward: tokens / denoise passes. tokens_per_pass: the reference's passes counted too, by their cost.
    The mean passes of a problem are given by kind; prefill and store passes are in neither rate.
    """

    threshold: float
    num_problems: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    tokens_per_forward: float
    tokens_per_pass: float
    mean_tokens: float
    mean_denoise: float
    mean_reference: float
    mean_prefill: float
    mean_store: float


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % bootstrap interval. None: not defined (value), or in too few resamples (interval)."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Gain:
    """Difference in accuracy (arm - baseline) where both make `tokens_per_pass`, by interpolation."""

    tokens_per_pass: float
    difference: Estimate


@dataclass(frozen=True)
class Comparison:
    """`ratio`: tokens per pass of the arm over the baseline's, both at `accuracy_level` (above 1: fewer passes)."""

    num_problems: int
    accuracy_level: float
    ratio: Estimate
    gains: tuple[Gain, ...]


def collect(rows: Iterable[Mapping[str, Any]]) -> dict[str, Outcomes]:
    """Group per-example rows by arm; every arm must hold each of its problems once at each of its thresholds.

    A row has arm, threshold, example_id, correct, tokens, denoise, reference, prefill, store.
    """
    by_arm: dict[str, dict[tuple[float, str], Mapping[str, Any]]] = {}
    for row in rows:
        cells = by_arm.setdefault(row["arm"], {})
        key = (float(row["threshold"]), str(row["example_id"]))
        if key in cells:
            raise UserError(f"results: arm {row['arm']!r} has example {key[1]!r} twice at threshold {key[0]}")
        cells[key] = row
    return {arm: _outcomes(arm, cells) for arm, cells in by_arm.items()}


def wilson_interval(successes: float, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927): sound at 0, at 1 and for few trials."""
    if trials < 1:
        raise UserError("no problems were evaluated; an interval needs at least one")
    p = successes / trials
    center = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # At 0 and 1 the end equals p exactly, but for rounding.
    return min(p, max(0.0, (center - spread) / scale)), max(p, min(1.0, (center + spread) / scale))


def curve(outcomes: Outcomes, reference_weight: float) -> list[Point]:
    """One point per threshold, in the order of `outcomes.thresholds`."""
    cost = outcomes.cost(reference_weight)
    num_problems = len(outcomes.example_ids)
    points = []
    for t, threshold in enumerate(outcomes.thresholds):
        num_correct = float(outcomes.correct[t].sum())
        low, high = wilson_interval(num_correct, num_problems)
        tokens = float(outcomes.tokens[t].sum())
        points.append(
            Point(
                threshold=threshold,
                num_problems=num_problems,
                accuracy=num_correct / num_problems,
                accuracy_low=low,
                accuracy_high=high,
                tokens_per_forward=tokens / float(outcomes.denoise[t].sum()),
                tokens_per_pass=tokens / float(cost[t].sum()),
                mean_tokens=tokens / num_problems,
                mean_denoise=float(outcomes.denoise[t].mean()),
                mean_reference=float(outcomes.reference[t].mean()),
                mean_prefill=float(outcomes.prefill[t].mean()),
                mean_store=float(outcomes.store[t].mean()),
            )
        )
    return points


def crossing(values: Array, along: Array, level: float) -> Array:
    """Walk the sweep from point to point: the largest `values` (..., T) where `along` (..., T) crosses `level`.

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


def compare(
    baseline: Outcomes,
    arm: Outcomes,
    reference_weight: float,
    accuracy_level: float = 0.9,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Paired bootstrap over problems, percentile intervals (Efron and Tibshirani 1993, chapter 13).

    Gains are taken at NUM_RATES rates evenly spaced inside the range that both curves cover. reference_weight: cost of
    a reference pass in target passes. UserError where the two did not decode the same problems.
    """
    if baseline.example_ids != arm.example_ids:
        raise UserError("results: the two arms did not decode the same problems, so they cannot be compared in pairs")
    num_problems = len(arm.example_ids)
    once = np.ones((1, num_problems))
    rates = _shared_rates(*(_rates_and_accuracies(o, reference_weight, once)[0] for o in (baseline, arm)))
    value = _differences(baseline, arm, reference_weight, once, rates, accuracy_level)[0]
    generator = np.random.default_rng(seed)
    drawn = []
    for first in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - first)
        times = generator.multinomial(num_problems, np.full(num_problems, 1.0 / num_problems), size=size)
        drawn.append(_differences(baseline, arm, reference_weight, times.astype(float), rates, accuracy_level))
    samples = np.concatenate(drawn)
    estimates = [_estimate(value[i], samples[:, i]) for i in range(len(value))]
    gains = tuple(Gain(rate, estimate) for rate, estimate in zip(rates, estimates[1:], strict=True))
    return Comparison(num_problems, accuracy_level, estimates[0], gains)


def _differences(
    baseline: Outcomes, arm: Outcomes, weight: float, times: Array, rates: Sequence[float], accuracy_level: float
) -> Array:
    """(R, N) how often each problem is drawn -> (R, 1 + len(rates)): the ratio, then the gain at each rate."""
    base_rate, base_accuracy = _rates_and_accuracies(baseline, weight, times)
    arm_rate, arm_accuracy = _rates_and_accuracies(arm, weight, times)
    ratio = crossing(arm_rate, arm_accuracy, accuracy_level) / crossing(base_rate, base_accuracy, accuracy_level)
    gains = [crossing(arm_accuracy, arm_rate, r) - crossing(base_accuracy, base_rate, r) for r in rates]
    return np.stack([ratio, *gains], axis=1)


def _shared_rates(baseline: Array, arm: Array) -> list[float]:
    """Rates strictly inside both ranges: at the ends of a range half of the resamples would have no value."""
    low, high = max(baseline.min(), arm.min()), min(baseline.max(), arm.max())
    return np.linspace(low, high, NUM_RATES + 2)[1:-1].round(3).tolist() if low < high else []


def _rates_and_accuracies(outcomes: Outcomes, weight: float, times: Array) -> tuple[Array, Array]:
    """(R, N) -> tokens per pass and accuracy, each (R, T)."""
    rate = (times @ outcomes.tokens.T) / (times @ outcomes.cost(weight).T)
    return rate, (times @ outcomes.correct.T) / times.sum(axis=1, keepdims=True)


def _estimate(value: float, samples: Array) -> Estimate:
    if math.isnan(value):
        return Estimate(None, None, None)
    defined = samples[~np.isnan(samples)]
    if len(defined) < _LEAST_DEFINED * len(samples):
        return Estimate(float(value), None, None)
    low, high = np.quantile(defined, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def _outcomes(arm: str, cells: Mapping[tuple[float, str], Mapping[str, Any]]) -> Outcomes:
    thresholds = tuple(sorted({threshold for threshold, _ in cells}))
    example_ids = tuple(sorted({example_id for _, example_id in cells}))
    if len(cells) != len(thresholds) * len(example_ids):
        raise UserError(
            f"results: arm {arm!r} has {len(cells)} rows for {len(thresholds)} thresholds "
            f"and {len(example_ids)} examples; decode every example at every threshold"
        )

    def table(name: str) -> Array:
        return np.array([[float(cells[t, e][name]) for e in example_ids] for t in thresholds])

    fields: Sequence[str] = ("correct", "tokens", "denoise", "reference", "prefill", "store")
    return Outcomes(thresholds, example_ids, **{name: table(name) for name in fields})
