"""The report of an endpoint that tells no passes: accuracy and tokens per second, and nothing that was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.evaluation.results import SCHEMA_VERSION, ArmInfo
from pipelines.report.page import note, page, table
from rcd_core.evaluation.outcomes import collect, curve

NOT_REPORTED = "not reported"
_TOLD = (
    "threshold", "num_problems", "num_samples", "accuracy", "accuracy_low", "accuracy_high", "standard_error",
    "accuracy_by_sample", "tokens_per_second", "mean_tokens",
)  # fmt: skip


def foreign_results(
    recipe: str,
    task: str,
    seed: int,
    arms: Sequence[ArmInfo],
    rows: Sequence[Mapping[str, Any]],
    asked: Mapping[str, Mapping[str, Any]],
    hardware: Mapping[str, Any],
) -> dict[str, Any]:
    """results.json: a point per arm, passes and rates null. asked: the settings each arm was asked for with."""
    passes = {"denoise": 1, "reference": 0, "prefill": 0, "store": 0}  # unknown, and in nothing that is kept
    outcomes = collect([{**row, **passes} for row in rows])
    points = {
        arm.name: [
            {name: value if name in _TOLD else None for name, value in asdict(point).items()} | {"threshold": None}
            for point in curve(outcomes[arm.name])
        ]
        for arm in arms
    }
    first = next(iter(outcomes.values()))
    return {
        "schema_version": SCHEMA_VERSION,
        "passes": NOT_REPORTED,
        "recipe": recipe,
        "task": task,
        "seed": seed,
        "num_problems": len(first.example_ids),
        "num_samples": first.correct.shape[2],
        "thresholds": [],
        "hardware": dict(hardware),
        "arms": [{**asdict(arm), "decode": dict(asked[arm.name]), "curve": points[arm.name]} for arm in arms],
        "comparisons": [],
    }


def print_foreign(results: Mapping[str, Any], console: Console) -> None:
    head, rows = _cells(results)
    made = Table(*head, title=_title(results), caption="the endpoint does not tell its passes")
    for row in rows:
        made.add_row(*row)
    console.print(made)


def foreign_page(results: Mapping[str, Any], sections: Sequence[tuple[str, str]] = ()) -> str:
    asked = [
        [
            arm["title"],
            ", ".join(f"{name} {value}" for name, value in arm["decode"].items()) or "the endpoint's defaults",
        ]
        for arm in results["arms"]
    ]
    parts = [
        table(*_cells(results)),
        note(
            "Accuracy with its 95 % interval. Tokens per second: of all requests under way together. Passes: this "
            "endpoint does not report them, so there is no curve of accuracy against tokens per pass."
        ),
        "<h2>Settings that were asked for</h2>",
        table(["arm", "settings"], asked, numbers=False),
        *(f"<h2>{escape(heading)}</h2>{body}" for heading, body in sections),
        "<h2>How it was measured</h2>",
        f"<p>{escape(str(results['reproduce']))}</p>",
        table(["", ""], [[name.replace("_", " "), str(v)] for name, v in results["hardware"].items()], numbers=False),
    ]
    return page(_title(results), "\n".join(parts))


def _title(results: Mapping[str, Any]) -> str:
    samples = f", {results['num_samples']} samples of each" if results["num_samples"] > 1 else ""
    return f"{results['recipe']}: {results['task']}, {results['num_problems']} problems{samples}"


def _cells(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for arm in results["arms"]:
        for p in arm["curve"]:
            accuracy = f"{100 * p['accuracy']:.1f} ({100 * p['accuracy_low']:.1f} to {100 * p['accuracy_high']:.1f})"
            speed = f"{p['tokens_per_second']:.1f}"
            rows.append([arm["title"], accuracy, speed, f"{p['mean_tokens']:.1f}", NOT_REPORTED])
    return ["model", "accuracy, %", "tokens/s", "tokens of an answer", "tokens per pass"], rows
