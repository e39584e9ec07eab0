"""Computes results.json from the rows of an evaluation. Pure functions: no run directory, no cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rcd_core.evaluation.advice import advise
from rcd_core.evaluation.outcomes import Measure, Outcomes, collect, curve
from rcd_core.evaluation.statistics import (
    AUP_ALPHA,
    AUP_OFFSET,
    RESAMPLES,
    aup,
    compare,
    estimate,
    resample,
)
from rcd_core.tasks import GRADERS, grade, has_official_grader

SCHEMA_VERSION = 2
LEADING: Measure = "tokens_per_pass"  # shown first in plots, headlines and comparisons
MEASURES: tuple[Measure, ...] = (LEADING, "tokens_per_forward")
AUP_SOURCE = "accuracy under parallelism, d3LLM, arXiv 2601.07568"


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """One way of decoding ("arm" in files). model: stage, checkpoint or endpoint model that decodes. baseline: the
    method to compare with, or None. trained_with: the residual settings of the model's training, or None."""

    name: str
    title: str
    model: str
    baseline: str | None
    start: str | None
    block_length: int
    trained_with: dict[str, Any] | None


def analyse(
    *,
    recipe: str,
    task: str,
    seed: int,
    methods: Sequence[MethodInfo],
    table: pa.Table,
    settings: Mapping[str, dict[str, Any]],
    accuracy_levels: Sequence[float],
    hardware: dict[str, Any],
    grader: str = "default",
) -> dict[str, Any]:
    """The content of results.json: a curve per method, and each method against its baseline.

    table: the rows of results.parquet. settings: method -> DecodeSettings in effect. hardware: where it was decoded.
    Raises UserError if a method lacks a problem at some threshold.
    """
    columns = [name for name in table.column_names if name not in ("completion", "finish_reason")]
    outcomes = collect(table.select(columns).to_pylist())
    curves = {name: resample(outcome, RESAMPLES, seed) for name, outcome in outcomes.items()}
    best = max(float(resampled.accuracy[0].max()) for resampled in curves.values())
    weights = _mean_weights(table)

    def entry(method: MethodInfo) -> dict[str, Any]:
        own = curves[method.name]
        return {
            **asdict(method),
            "decode": {k: v for k, v in settings[method.name].items() if k != "confidence_threshold"},
            **weights[method.name],
            "aup": {m: asdict(estimate(aup(own.rates[m], own.accuracy, best))) for m in MEASURES},
            "curve": [asdict(point) for point in curve(outcomes[method.name])],
        }

    def comparison(name: str, baseline: str) -> dict[str, Any]:
        options: Any = {"accuracy_levels": accuracy_levels, "best_accuracy": best}
        compared = {str(m): asdict(compare(curves[baseline], curves[name], **options, measure=m)) for m in MEASURES}
        advice = advise(outcomes[baseline], outcomes[name])
        return {"arm": name, "baseline": baseline, **compared, "advice": advice and asdict(advice)}

    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe,
        "task": task,
        "seed": seed,
        "num_problems": max(len(outcome.example_ids) for outcome in outcomes.values()),
        "num_samples": max(outcome.correct.shape[2] for outcome in outcomes.values()),
        "thresholds": sorted({t for outcome in outcomes.values() for t in outcome.thresholds}),
        "hardware": hardware,
        "grader": grading(grader, table["graders_differ"].to_pylist()),
        "arms": [entry(method) for method in methods],
        "comparisons": [comparison(m.name, m.baseline) for m in methods if m.baseline in curves],
        "statistics": {
            "leading_measure": LEADING,
            "tokens_per_pass": "tokens per pass that chooses tokens; a reference pass is weighted by its FLOPs",
            "tokens_per_forward": "the paper's: tokens per denoising pass of the target, without reference passes",
            "tokens_per_pass_by_parameters": "a reference pass is weighted by the ratio of parameters",
            "left_out": "prefill and store passes only fill a cache and count in no rate; the curves have their means",
            "accuracy_interval": _accuracy_interval(outcomes),
            "comparison_interval": "paired bootstrap over problems, percentile, 95 %",
            "resamples": RESAMPLES,
            "seed": seed,
            "aup": {"alpha": AUP_ALPHA, "offset_points": 100 * AUP_OFFSET, "best_accuracy": best, "source": AUP_SOURCE},
        },
    }


def judge(task: str, grader: str, completion: str, answer: str, prompt: str) -> dict[str, bool | None]:
    """The columns `correct`, by the grader, and `graders_differ`. The arguments are those of rcd_core.tasks.grade."""
    correct = grade(task, completion, answer, prompt, grader)
    if not has_official_grader(task):
        return {"correct": correct, "graders_differ": None}
    (other,) = (name for name in GRADERS if name != grader)
    return {"correct": correct, "graders_differ": correct != grade(task, completion, answer, prompt, other)}


def grading(grader: str, differ: Sequence[bool | None]) -> dict[str, Any]:
    """Which grader judged, and how many of the answers that both judged they judge differently; null if there are none.

    differ: the column graders_differ.
    """
    both = [value for value in differ if value is not None]
    return {"name": grader, "answers": len(both), "differ": sum(both) if both else None}


def _accuracy_interval(outcomes: Mapping[str, Outcomes]) -> str:
    if all(outcome.correct.shape[2] == 1 for outcome in outcomes.values()):
        return "Wilson, 95 %"
    return "95 %, plus and minus 1.96 standard errors of the mean over problems"


def _mean_weights(table: pa.Table) -> dict[str, dict[str, float]]:
    """Method -> mean cost of a reference pass in target passes, by parameters and by FLOPs; 0 without such passes."""
    names = ("reference_weight", "reference_flops_weight")
    warm = table.filter(pc.greater(table["reference"], 0)).group_by("arm").aggregate([(name, "mean") for name in names])
    means = {row["arm"]: {name: row[f"{name}_mean"] for name in names} for row in warm.to_pylist()}
    return {name: means.get(name, dict.fromkeys(names, 0.0)) for name in table["arm"].unique().to_pylist()}
