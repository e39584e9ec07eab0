"""results.json: from the rows of an evaluation to what it says. Pure functions, no run and no cluster inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rcd_core.evaluation.outcomes import Measure, Outcomes, collect, curve
from rcd_core.evaluation.statistics import (
    AUP_ALPHA,
    AUP_OFFSET,
    RESAMPLES,
    Curves,
    Estimate,
    aup,
    compare,
    estimate,
    resample,
)

SCHEMA_VERSION = 2
LEADING: Measure = "tokens_per_pass"  # what plots, headlines and comparisons show first
MEASURES: tuple[Measure, ...] = (LEADING, "tokens_per_forward")
AUP_SOURCE = "accuracy under parallelism, d3LLM, arXiv 2601.07568"


@dataclass(frozen=True, kw_only=True)
class ArmInfo:
    """What a page says of an arm. model: the stage (or checkpoint) it comes from. baseline: the arm that it is compared
    with, or None. trained_with: the residual settings it was trained with, or None."""

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
    arms: Sequence[ArmInfo],
    table: pa.Table,
    settings: Mapping[str, dict[str, Any]],
    accuracy_levels: Sequence[float],
    hardware: dict[str, Any],
) -> dict[str, Any]:
    """The mapping of results.json: a curve per arm, each arm against its baseline.

    table: the rows of results.parquet. settings: arm -> its DecodeSettings as in effect. hardware: on what it was
    decoded. UserError where an arm lacks a problem at some threshold.
    """
    columns = [name for name in table.column_names if name not in ("completion", "finish_reason")]
    outcomes = collect(table.select(columns).to_pylist())
    curves = {name: resample(found, RESAMPLES, seed) for name, found in outcomes.items()}
    best = max(float(found.accuracy[0].max()) for found in curves.values())
    weights = _mean_weights(table)
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": recipe,
        "task": task,
        "seed": seed,
        "num_problems": max(len(found.example_ids) for found in outcomes.values()),
        "num_samples": max(found.correct.shape[2] for found in outcomes.values()),
        "thresholds": sorted({t for found in outcomes.values() for t in found.thresholds}),
        "hardware": hardware,
        "arms": [
            {
                **asdict(arm),
                "decode": {k: v for k, v in settings[arm.name].items() if k != "confidence_threshold"},
                **weights[arm.name],
                "aup": {measure: asdict(_aup(curves[arm.name], measure, best)) for measure in MEASURES},
                "curve": [asdict(point) for point in curve(outcomes[arm.name])],
            }
            for arm in arms
        ],
        "comparisons": [
            {
                "arm": arm.name,
                "baseline": arm.baseline,
                **{
                    measure: asdict(
                        compare(
                            curves[arm.baseline],
                            curves[arm.name],
                            accuracy_levels=accuracy_levels,
                            best_accuracy=best,
                            measure=measure,
                        )
                    )
                    for measure in MEASURES
                },
            }
            for arm in arms
            if arm.baseline in curves
        ],
        "statistics": {
            "leading_measure": LEADING,
            "tokens_per_pass": "tokens over passes that choose tokens, a reference pass counted by its FLOPs",
            "tokens_per_forward": "the paper's: tokens over denoising passes of the target, reference passes left out",
            "tokens_per_pass_by_parameters": "a reference pass counted by the ratio of parameters",
            "left_out": "prefill and store passes only fill a cache and are in no rate; the curves have their means",
            "accuracy_interval": _accuracy_interval(outcomes),
            "comparison_interval": "paired bootstrap over problems, percentile, 95 %",
            "resamples": RESAMPLES,
            "seed": seed,
            "aup": {"alpha": AUP_ALPHA, "offset_points": 100 * AUP_OFFSET, "best_accuracy": best, "source": AUP_SOURCE},
        },
    }


def _aup(found: Curves, measure: Measure, best: float) -> Estimate:
    return estimate(aup(found.rates[measure], found.accuracy, best))


def _accuracy_interval(outcomes: Mapping[str, Outcomes]) -> str:
    if all(found.correct.shape[2] == 1 for found in outcomes.values()):
        return "Wilson, 95 %"
    return "95 %, plus and minus 1.96 standard errors of the mean over problems"


def _mean_weights(table: pa.Table) -> dict[str, dict[str, float]]:
    """Arm -> mean cost of a reference pass in target passes, by parameters and by FLOPs; 0 where it makes none."""
    names = ("reference_weight", "reference_flops_weight")
    warm = table.filter(pc.greater(table["reference"], 0)).group_by("arm").aggregate([(name, "mean") for name in names])
    found = {row["arm"]: {name: row[f"{name}_mean"] for name in names} for row in warm.to_pylist()}
    return {arm: found.get(arm, dict.fromkeys(names, 0.0)) for arm in table["arm"].unique().to_pylist()}
