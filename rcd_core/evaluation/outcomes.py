"""What an evaluation has seen: rows to tables of outcomes, and the curve of an arm over its thresholds.

An arm is one model decoded in one way over a sweep of confidence thresholds.

Shapes: T thresholds, N problems, S samples of a problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError
from rcd_core.evaluation.pass_at_1 import pass_at_1

Array = NDArray[np.float64]
Measure = Literal["tokens_per_pass", "tokens_per_forward"]
Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
_COUNTS = ("tokens", "denoise", "reference", "prefill", "store")


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """One arm's results. correct (T, N, S); everything else (T, N), a mean over the samples of a problem.

    tokens: generated up to the end of the answer (infill: filled). denoise: target passes that choose tokens;
    prefill and store: target passes that only fill the cache; reference: passes of the reference model.
    reference_cost, reference_cost_by_parameters: those in passes of the target, by FLOPs (flops.py) and by the
    number of parameters. seconds: of the device, an answer's share of its batch.
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
        """(T, N) share of a problem's samples that are right."""
        return np.asarray(self.correct.mean(axis=2))

    def passes(self, measure: Measure) -> Array:
        """(T, N) passes that produce tokens: with the reference's by their FLOPs, or without them as the paper counts
        (tokens_per_forward)."""
        return self.denoise if measure == "tokens_per_forward" else self.denoise + self.reference_cost


@dataclass(frozen=True, kw_only=True)
class Point:
    """One arm at one threshold. Rates are ratios of sums over all answers.

    accuracy: mean over problems of the share of samples that are right. accuracy_low, accuracy_high: 95 %, Wilson's
    interval for one sample per problem, else accuracy -+ 1.96 standard errors (pass_at_1.py). accuracy_by_sample:
    of the first, second, ... sample of every problem.
    tokens_per_pass leads everywhere: a reference pass is counted by its FLOPs; tokens_per_forward is the paper's, which
    leaves reference passes out. The means are per answer; prefill and store passes are in no rate.
    tokens_per_second: of one actor; None where nobody took the time.
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
    """Group rows, one per answer, by arm; every arm must hold each sample of its problems once at each threshold.

    A row has arm, threshold, example_id, correct, tokens, denoise, reference, prefill, store, and where reference is
    not 0 reference_flops_weight and reference_weight, the costs of one in target passes. Optional: sample (0), seconds.
    """
    by_arm: dict[str, dict[tuple[float, str, int], Mapping[str, Any]]] = {}
    for row in rows:
        cells = by_arm.setdefault(row["arm"], {})
        key = (float(row["threshold"]), str(row["example_id"]), int(row.get("sample") or 0))
        if key in cells:
            raise UserError(
                f"results: arm {row['arm']!r} has example {key[1]!r}, sample {key[2]}, twice at threshold {key[0]}"
            )
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


def curve(outcomes: Outcomes) -> list[Point]:
    """One point per threshold, in the order of `outcomes.thresholds`."""
    return [_point(outcomes, t) for t in range(len(outcomes.thresholds))]


def _point(o: Outcomes, t: int) -> Point:
    _, num_problems, num_samples = o.correct.shape
    found = pass_at_1(o.correct[t])
    if num_samples == 1:
        low, high = wilson_interval(float(o.correct[t].sum()), num_problems)
    else:
        spread = Z_95 * (found.standard_error if found.standard_error is not None else math.inf)
        low, high = max(0.0, found.mean - spread), min(1.0, found.mean + spread)
    tokens, denoise, seconds = (float(x[t].sum()) for x in (o.tokens, o.denoise, o.seconds))
    return Point(
        threshold=o.thresholds[t],
        num_problems=num_problems,
        num_samples=num_samples,
        accuracy=found.mean,
        accuracy_low=low,
        accuracy_high=high,
        standard_error=found.standard_error,
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


def _outcomes(arm: str, cells: Mapping[tuple[float, str, int], Mapping[str, Any]]) -> Outcomes:
    thresholds, example_ids, samples = (tuple(sorted(set(values))) for values in zip(*cells, strict=True))
    shape = (len(thresholds), len(example_ids), len(samples))
    if len(cells) != math.prod(shape):
        raise UserError(
            f"results: arm {arm!r} has {len(cells)} rows for {shape[0]} thresholds, {shape[1]} examples and {shape[2]} "
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
        reference_cost=mean([_cost(arm, row, "reference_flops_weight") for row in rows]),
        reference_cost_by_parameters=mean([_cost(arm, row, "reference_weight") for row in rows]),
        seconds=mean([float(row.get("seconds") or 0.0) for row in rows]),
    )


def _cost(arm: str, row: Mapping[str, Any], weight: str) -> float:
    if not row["reference"]:
        return 0.0
    if row.get(weight) is None:
        raise UserError(
            f"results: arm {arm!r} has reference passes but no {weight}; give the cost of one in passes of the target"
        )
    return float(row["reference"] * row[weight])
