"""From the answers of an endpoint to results.parquet, results.json, plots and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from pipelines.data.problems import TestProblem
from pipelines.evaluation.actor import ROWS
from pipelines.evaluation.endpoint import EndpointAnswers, EndpointOptions
from pipelines.evaluation.results import analyse
from pipelines.recipe.model import Recipe
from pipelines.recipe.settings_files import provenance, provenance_line, provenance_section
from pipelines.report.evaluation import html_report, plots_of, print_tables
from pipelines.report.foreign import foreign_page, foreign_results, print_foreign
from rcd_core.io import storage
from rcd_core.tasks import get_task

Answers = Sequence[dict[str, Any]]


def write_report(collected: EndpointAnswers, command: str, console: Console) -> None:
    """Grade the answers, write results.parquet, results.json, plots and report.html, and print the tables.

    command: the command line that makes these results.
    """
    recipe, options, answers = collected.recipe, collected.options, collected.answers
    rows = _rows(recipe, collected.problems, answers, options.reference_flops_weight)
    infos = [method.info for method in collected.methods]
    order = [info.name for info in infos]
    rows.sort(key=lambda row: (order.index(row["arm"]), row["threshold"], row["example_id"], row["sample"]))
    table = pa.Table.from_pylist(rows, schema=ROWS)
    with storage.open_output(storage.join(recipe.run_directory, "results.parquet")) as stream:
        pq.write_table(table, stream, compression="zstd")
    settings_file = provenance(recipe)
    about, notes = _about(recipe, options, answers), _notes(command) | {"settings_file": settings_file}
    sections = provenance_section(settings_file)
    if collected.is_rcd:
        settings = {answer["arm"]: {**answer["settings"], "seed": recipe.seed} for answer in answers}
        infos = [replace(info, block_length=settings[info.name]["block_length"]) for info in infos]
        levels = recipe.evaluate.accuracy_levels
        results = analyse(arms=infos, table=table, settings=settings, accuracy_levels=levels, **about) | notes
        plots = plots_of(results)
        for name, (light, _) in plots.items():
            storage.write_bytes(storage.join(recipe.run_directory, f"{name}.png"), light)
        page = html_report(results, plots, [*sections, *_warm_starts(answers)])
        print_tables(results, console)
    else:
        sent = {method.info.name: method.settings for method in collected.methods}
        results = foreign_results(arms=infos, rows=rows, asked=sent, **about) | notes
        page = foreign_page(results, sections)
        print_foreign(results, console)
    if line := provenance_line(settings_file):
        console.print(line, soft_wrap=True, markup=False)
    storage.write_json(storage.join(recipe.run_directory, "results.json"), results)
    path = storage.join(recipe.run_directory, "report.html")
    storage.write_bytes(path, page.encode())
    console.print(f"report: {path}", soft_wrap=True, markup=False)


def _about(recipe: Recipe, options: EndpointOptions, answers: Answers) -> dict[str, Any]:
    """What both kinds of results begin with."""
    fingerprints = sorted({answer["fingerprint"] for answer in answers if answer["fingerprint"]})
    deployed = {"deployment": ", ".join(fingerprints)} if fingerprints else {}
    return {
        "recipe": recipe.name,
        "task": recipe.data.task_of("test"),
        "seed": recipe.seed,
        "hardware": {"endpoint": options.url, **deployed, "requests_at_a_time": options.concurrency},
    }


def _notes(command: str) -> dict[str, Any]:
    """What the page says otherwise than of a run."""
    return {
        "reproduce": f"{command} (the answers also depend on what is deployed at that address)",
        "reference_cost": "which is assumed (--reference_flops_weight), as an endpoint does not tell",
        "decoded_by": "the endpoint",
    }


def _rows(
    recipe: Recipe, problems: Sequence[TestProblem], answers: Answers, reference_weight: float
) -> list[dict[str, Any]]:
    """Answers graded, as rows of results.parquet."""
    task, by_id = get_task(recipe.data.task_of("test")), {problem.example_id: problem for problem in problems}
    rows = []
    for answer in answers:
        problem, forwards = by_id[answer["example_id"]], answer["forwards"] or {}
        weight = reference_weight if forwards.get("reference") else 0.0
        row = {name: answer[name] for name in ROWS.names if name in answer}
        row |= {kind: forwards.get(kind) for kind in ("denoise", "reference", "prefill", "store")}
        row |= {"reference_weight": weight, "reference_flops_weight": weight}
        row["correct"] = task.grade(problem.prompt, answer["completion"], problem.answer)
        rows.append(row)
    return rows


def _warm_starts(answers: Answers) -> list[tuple[str, str]]:
    """Blocks that should have started from the reference's predictions and could not."""
    if not any(answer["forwards"]["reference"] for answer in answers):
        return []
    failures = sum(answer["reference_failures"] for answer in answers)
    text = f"{failures} blocks had to start from zero because the endpoint's reference did not answer."
    return [("Reference passes", f"<p>{text}</p>")]
