"""Turns the answers of an endpoint into results.parquet, results.json, plots and a page.

An endpoint of this project reports its passes and gets the report of any evaluation. For any other endpoint the report
has accuracy and tokens per second, and no curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from pipelines.evaluation.actor import ROWS
from pipelines.evaluation.endpoint import EndpointAnswers
from pipelines.evaluation.results import SCHEMA_VERSION, MethodInfo, analyse, grading, judge
from pipelines.recipe.settings_files import provenance
from pipelines.report import text
from pipelines.report.evaluation import print_tables, write_evaluation
from pipelines.report.examples import examples_of
from pipelines.report.render import print_table, render
from pipelines.report.text import Cells, Results
from rcd_core.evaluation.outcomes import collect, curve
from rcd_core.io import storage

NOT_REPORTED = "not reported"
_REPORTED = {
    "num_problems", "num_samples", "accuracy", "accuracy_low", "accuracy_high", "standard_error", "accuracy_by_sample",
    "tokens_per_second", "mean_tokens",
}  # fmt: skip


def write_report(collected: EndpointAnswers, command: str, console: Console) -> None:
    """Grade the answers, write results.parquet, results.json, plots and report.html, and print the tables.

    command: the command line that makes these results.
    """
    recipe, options, answers = collected.recipe, collected.options, collected.answers
    infos = [method.info for method in collected.methods]
    order = [info.name for info in infos]
    rows = _graded_rows(collected)
    rows.sort(key=lambda row: (order.index(row["arm"]), row["threshold"], row["example_id"], row["sample"]))
    table = pa.Table.from_pylist(rows, schema=ROWS)
    with storage.open_output(storage.join(recipe.run_directory, "results.parquet")) as stream:
        pq.write_table(table, stream, compression="zstd")
    fingerprints = sorted({answer["fingerprint"] for answer in answers if answer["fingerprint"]})
    deployed = {"deployment": ", ".join(fingerprints)} if fingerprints else {}
    about: dict[str, Any] = {
        "recipe": recipe.name,
        "task": recipe.data.task_of("test"),
        "seed": recipe.seed,
        "hardware": {"endpoint": options.url, **deployed, "requests_at_a_time": options.concurrency},
    }
    notes = {
        "reproduce": f"{command} (the answers also depend on what is deployed at that address)",
        "reference_cost": "an assumption (--reference_flops_weight), as endpoints do not report it",
        "decoded_by": "the endpoint",
        "settings_file": provenance(recipe),
    }
    if collected.is_rcd:
        settings = {answer["arm"]: {**answer["settings"], "seed": recipe.seed} for answer in answers}
        infos = [replace(info, block_length=settings[info.name]["block_length"]) for info in infos]
        levels = recipe.evaluate.accuracy_levels
        results = analyse(
            methods=infos,
            table=table,
            settings=settings,
            accuracy_levels=levels,
            grader=recipe.evaluate.grader,
            **about,
        )
        problems = {p.example_id: {"prompt": p.prompt, "answer": p.answer} for p in collected.problems}
        results |= notes | {"examples": examples_of(results, table, lambda ids: problems)}
        write_evaluation(recipe.run_directory, results, _reference_failures(answers))
        print_tables(results, console)
    else:
        requested = {method.info.name: method.settings for method in collected.methods}
        results = _results_without_passes(infos, rows, requested, **about) | notes
        results["grader"] = grading(recipe.evaluate.grader, [row["graders_differ"] for row in rows])
        storage.write_json(storage.join(recipe.run_directory, "results.json"), results)
        page = _page_without_passes(results).encode()
        storage.write_bytes(storage.join(recipe.run_directory, "report.html"), page)
        caption = "the endpoint does not report its passes"
        print_table(console, _speed_table(results), text.title(results), caption)
        if line := text.grader(results):
            console.print(line, soft_wrap=True, markup=False)
        if line := text.settings_file_line(results):
            console.print(line, soft_wrap=True, markup=False)
    path = storage.join(recipe.run_directory, "report.html")
    console.print(f"report: {path}", soft_wrap=True, markup=False)


def _graded_rows(collected: EndpointAnswers) -> list[dict[str, Any]]:
    """The rows of results.parquet."""
    task, grader = collected.recipe.data.task_of("test"), collected.recipe.evaluate.grader
    by_id = {problem.example_id: problem for problem in collected.problems}
    rows = []
    for answer in collected.answers:
        problem, forwards = by_id[answer["example_id"]], answer["forwards"] or {}
        weight = collected.options.reference_flops_weight if forwards.get("reference") else 0.0
        row = {name: answer[name] for name in ROWS.names if name in answer}
        row |= {kind: forwards.get(kind) for kind in ("denoise", "reference", "prefill", "store")}
        row |= {"reference_weight": weight, "reference_flops_weight": weight}
        row |= judge(task, grader, answer["completion"], problem.answer, problem.prompt)
        rows.append(row)
    return rows


def _reference_failures(answers: Sequence[Mapping[str, Any]]) -> int | None:
    """Blocks that the reference should have warm-started and did not; None if there were no reference passes."""
    if not any(answer["forwards"]["reference"] for answer in answers):
        return None
    return sum(answer["reference_failures"] for answer in answers)


# -- endpoints that do not report passes


def _results_without_passes(
    infos: Sequence[MethodInfo],
    rows: Sequence[Mapping[str, Any]],
    requested: Mapping[str, Mapping[str, Any]],
    **about: Any,
) -> Results:
    """results.json with one point per method, in which passes and rates are null. requested: settings by method."""
    passes = {"denoise": 1, "reference": 0, "prefill": 0, "store": 0}  # placeholders; no number kept depends on them
    outcomes = collect([{**row, **passes} for row in rows])
    curves = {
        info.name: [
            {name: value if name in _REPORTED else None for name, value in asdict(point).items()}
            for point in curve(outcomes[info.name])
        ]
        for info in infos
    }
    first = next(iter(outcomes.values()))
    return {
        "schema_version": SCHEMA_VERSION,
        "passes": NOT_REPORTED,
        **about,
        "num_problems": len(first.example_ids),
        "num_samples": first.correct.shape[2],
        "thresholds": [],
        "arms": [{**asdict(i), "decode": dict(requested[i.name]), "curve": curves[i.name]} for i in infos],
        "comparisons": [],
    }


def _page_without_passes(results: Results) -> str:
    settings = [
        [
            method["title"],
            ", ".join(f"{name} {value}" for name, value in method["decode"].items()) or "endpoint defaults",
        ]
        for method in results["arms"]
    ]
    return render(
        "endpoint.html.j2",
        title=text.title(results),
        results=results,
        text=text,
        cells=_speed_table(results),
        settings=(["method", "settings"], settings),
        hardware=[(name.replace("_", " "), str(value)) for name, value in results["hardware"].items()],
    )


def _speed_table(results: Results) -> Cells:
    rows = [
        [method["title"], text.accuracy(p), f"{p['tokens_per_second']:.1f}", f"{p['mean_tokens']:.1f}", NOT_REPORTED]
        for method in results["arms"]
        for p in method["curve"]
    ]
    return ["model", "accuracy, %", "tokens/s", "tokens per answer", "tokens per pass"], rows
