"""From result rows to tables of outcomes, and to the curve of a method over its confidence thresholds.

A method ("arm" in files) is one model decoded in one way over a sweep of thresholds.

Shapes: T thresholds, N problems, S samples per problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError

Array = NDArray[np.float64]
Measure = Literal["tokens_per_pass", "tokens_per_forward"]
Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
_COUNTS = ("tokens", "denoise", "reference", "prefill", "store")


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Results of one method. correct (T, N, S); all others (T, N), means over the samples of a problem.

    tokens: generated up to the end of the answer (infill: filled). denoise: target passes that choose tokens;
    prefill, store: target passes that only fill the cache; reference: passes of the reference model.
    reference_cost, reference_cost_by_parameters: the latter in units of target passes, by FLOPs (flops.py) and by
    parameter counts. seconds: device time, an answer's share of its batch.
    """

    thresholds: tuple[float, ...]
    example_ids: tuple[str, ...]
    correct: Array
    tokens: Array
    denoise: Array
    reference: Array
    prefill: Array
    store: Array
    reference_cost: Array
    reference_cost_by_parameters: Array
    seconds: Array

    @property
    def rates(self) -> Array:
        """(T, N) share of correct samples."""
        return np.asarray(self.correct.mean(axis=2))

    def of(self, problems: NDArray[np.int64]) -> Outcomes:
        """The same method on some problems. problems: their numbers."""
        ids = tuple(self.example_ids[i] for i in problems)
        arrays = {f.name: getattr(self, f.name)[:, problems] for f in fields(self)[2:]}
        return Outcomes(thresholds=self.thresholds, example_ids=ids, **arrays)

    def passes(self, measure: Measure) -> Array:
        """(T, N) passes that produce tokens. Reference passes count by FLOPs, or not at all (tokens_per_forward)."""
        return self.denoise if measure == "tokens_per_forward" else self.denoise + self.reference_cost


@dataclass(frozen=True, kw_only=True)
class Point:
    """One method at one threshold. Rates are ratios of sums over all answers; means are per answer.

    accuracy: pass@1. accuracy_low, accuracy_high: 95 % interval, Wilson's for one sample per problem, else accuracy
    -+ 1.96 standard errors. accuracy_by_sample: of the first, second, ... sample of every problem.
    tokens_per_pass counts reference passes by FLOPs; tokens_per_forward, the paper's measure, omits them. No rate
    includes prefill and store passes. tokens_per_second: of one actor, None if not measured.
    """

    threshold: float
    num_problems: int
    num_samples: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    standard_error: float | None
    accuracy_by_sample: tuple[float, ...]
    tokens_per_pass: float
    tokens_per_forward: float
    tokens_per_pass_by_parameters: float
    tokens_per_second: float | None
    mean_tokens: float
    mean_denoise: float
    mean_reference: float
    mean_prefill: float
    mean_store: float


def collect(rows: Iterable[Mapping[str, Any]]) -> dict[str, Outcomes]:
    """Group rows, one per answer, by method. A method must have every sample of its problems once per threshold.

    Columns: arm, threshold, example_id, correct, tokens, denoise, reference, prefill, store; if reference is not 0 also
    reference_flops_weight and reference_weight, the cost of one reference pass in target passes. Optional: sample (0),
    seconds. Raises UserError for missing or duplicate rows and missing weights.
    """
    by_method: dict[str, dict[tuple[float, str, int], Mapping[str, Any]]] = {}
    for row in rows:
        cells = by_method.setdefault(row["arm"], {})
        key = (float(row["threshold"]), str(row["example_id"]), int(row.get("sample") or 0))
        if key in cells:
            raise UserError(
                f"results: arm {row['arm']!r} has example {key[1]!r}, sample {key[2]}, twice at threshold {key[0]}"
            )
        cells[key] = row
    return {method: _outcomes(method, cells) for method, cells in by_method.items()}


def wilson_interval(successes: float, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927). Raises UserError for 0 trials."""
    if trials < 1:
        raise UserError("no problems were evaluated; an interval needs at least one")
    p = successes / trials
    center = p + z * z / (2 * trials)
    spread = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # min and max: at p = 0 and p = 1 one end is p up to rounding errors.
    return min(p, max(0.0, (center - spread) / scale)), max(p, min(1.0, (center + spread) / scale))


def pass_at_1(correct: Array) -> tuple[float, float | None]:
    """Mean over problems of their success rates, and its standard error (None for a single problem).

    correct: (N, S). With m_i = mean_j correct_ij the mean is sum_i m_i / N (Chen et al. 2021, arXiv 2107.03374, Eq. 1,
    k = 1) and the standard error sqrt(sum_i (m_i - mean)^2 / (N (N - 1))). Samples of a problem do not count as
    independent; their scatter is in the m_i. Raises UserError for values other than 0 and 1.
    """
    if not np.isin(correct, (0.0, 1.0)).all():
        raise UserError("correct has values other than true and false")
    rates = correct.mean(axis=1)
    error = float(rates.std(ddof=1)) / math.sqrt(len(rates)) if len(rates) > 1 else None
    return float(rates.mean()), error


def curve(outcomes: Outcomes) -> list[Point]:
    """One point per threshold, in the order of `outcomes.thresholds`."""
    return [_point(outcomes, t) for t in range(len(outcomes.thresholds))]


def _point(o: Outcomes, t: int) -> Point:
    _, num_problems, num_samples = o.correct.shape
    accuracy, error = pass_at_1(o.correct[t])
    if num_samples == 1:
        low, high = wilson_interval(float(o.correct[t].sum()), num_problems)
    else:
        spread = Z_95 * (error if error is not None else math.inf)
        low, high = max(0.0, accuracy - spread), min(1.0, accuracy + spread)
    tokens, denoise, seconds = (float(x[t].sum()) for x in (o.tokens, o.denoise, o.seconds))
    return Point(
        threshold=o.thresholds[t],
        num_problems=num_problems,
        num_samples=num_samples,
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        standard_error=error,
        accuracy_by_sample=tuple(o.correct[t].mean(axis=0).tolist()),
        tokens_per_pass=tokens / float(o.passes("tokens_per_pass")[t].sum()),
        tokens_per_forward=tokens / denoise,
        tokens_per_pass_by_parameters=tokens / (denoise + float(o.reference_cost_by_parameters[t].sum())),
        tokens_per_second=tokens / seconds if seconds > 0 else None,
        mean_tokens=tokens / num_problems,
        mean_denoise=denoise / num_problems,
        mean_reference=float(o.reference[t].mean()),
        mean_prefill=float(o.prefill[t].mean()),
        mean_store=float(o.store[t].mean()),
    )


def _outcomes(method: str, cells: Mapping[tuple[float, str, int], Mapping[str, Any]]) -> Outcomes:
    thresholds, example_ids, samples = (tuple(sorted(set(values))) for values in zip(*cells, strict=True))
    shape = (len(thresholds), len(example_ids), len(samples))
    if len(cells) != math.prod(shape):
        raise UserError(
            f"results: arm {method!r} has {len(cells)} rows for {shape[0]} thresholds, {shape[1]} examples, {shape[2]} "
            "samples; decode every sample of every example at every threshold"
        )
    rows = [cells[t, e, s] for t in thresholds for e in example_ids for s in samples]

    def table(values: list[float]) -> Array:
        return np.array(values, dtype=np.float64).reshape(shape)

    def mean(values: list[float]) -> Array:
        return np.asarray(table(values).mean(axis=2))

    return Outcomes(
        thresholds=thresholds,
        example_ids=example_ids,
        correct=table([float(row["correct"]) for row in rows]),
        **{name: mean([float(row[name]) for row in rows]) for name in _COUNTS},
        reference_cost=mean([_cost(method, row, "reference_flops_weight") for row in rows]),
        reference_cost_by_parameters=mean([_cost(method, row, "reference_weight") for row in rows]),
        seconds=mean([float(row.get("seconds") or 0.0) for row in rows]),
    )


def _cost(method: str, row: Mapping[str, Any], weight: str) -> float:
    if not row["reference"]:
        return 0.0
    if row.get(weight) is None:
        raise UserError(
            f"results: arm {method!r} has reference passes but no {weight}, the cost of one in target passes"
        )
    return float(row["reference"] * row[weight])
