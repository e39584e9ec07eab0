"""evaluate: decode the held-out problems with every model over a sweep of confidence thresholds, and compare.

    python pipelines/evaluate.py --recipe demo

Arms: SeqD (the baseline, plain block decoding) and RCD (every target, once per start). All arms solve the same
problems at the same thresholds, so they are compared in pairs. Writes results.parquet (a row per arm, threshold and
problem), results.json (curves, comparisons, settings), pareto.png and report.html.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.decode_actor import DECODED, ROWS, Arm, DecodeActor, Plan, Work
from pipelines.report import html_report, pareto_plot, print_tables
from pipelines.run import StageContext
from rcd_core import storage
from rcd_core.evaluation import collect, compare, curve

SCHEMA_VERSION = 1
BASELINE = "seqd"
ACCURACY_LEVEL = 0.9
RESAMPLES = 2000


def run(ctx: StageContext) -> dict[str, Any]:
    """Decode, compare, write. The summary repeats the curves, so that a manifest tells what came out."""
    plan = make_plan(ctx)
    table = _decode(ctx, plan)
    settings = {
        arm: json.loads(text) for arm, text in dict(zip(*_columns(table, "arm", "settings"), strict=True)).items()
    }
    table = table.select(ROWS.names)
    with storage.open_output(storage.join(ctx.directory, "results.parquet")) as stream:
        pq.write_table(table, stream, compression="zstd")
    results = analyse(ctx, plan, table, settings)
    storage.write_json(storage.join(ctx.directory, "results.json"), results)
    light, dark = pareto_plot(results), pareto_plot(results, dark=True)
    storage.write_bytes(storage.join(ctx.directory, "pareto.png"), light)
    storage.write_bytes(storage.join(ctx.directory, "report.html"), html_report(results, light, dark).encode())
    return {"num_problems": results["num_problems"], "curves": {a["name"]: a["curve"] for a in results["arms"]}}


def report(ctx: StageContext) -> None:
    """Print the tables of a finished evaluation and where its files lie."""
    print_tables(storage.read_json(storage.join(ctx.directory, "results.json")), ctx.console)
    for what, name in (("plot", "pareto.png"), ("report", "report.html"), ("numbers", "results.json")):
        ctx.console.print(f"{what}: {storage.join(ctx.directory, name)}", soft_wrap=True, markup=False)


def make_plan(ctx: StageContext) -> Plan:
    """Arms and pieces of work: a pure function of the recipe and the manifests."""
    recipe, evaluate = ctx.recipe, ctx.recipe.evaluate
    summary = ctx.input("prepare")["summary"]
    num_examples = min(evaluate.num_examples or sys.maxsize, summary["counts"]["test"]["examples"])
    arms = tuple(_arms(ctx))
    work = tuple(
        Work(arm=arm, threshold=threshold, first=first, last=min(first + evaluate.batch_size, num_examples))
        for arm in range(len(arms))
        for threshold in sorted(evaluate.thresholds, reverse=True)  # most passes first: no long tail at the end
        for first in range(0, num_examples, evaluate.batch_size)
    )
    directory = ctx.input_dir("prepare")
    return Plan(
        task=recipe.data.task,
        run_code=recipe.evaluate.run_code,
        tokenizer=storage.join(directory, "tokenizer"),
        files=tuple(storage.join(directory, "test", name) for name in summary["test"]),
        arms=arms,
        work=work,
        threads=max(1, int(recipe.resources.cpus_per_worker)),
    )


def _arms(ctx: StageContext) -> Iterator[Arm]:
    recipe, decode = ctx.recipe, ctx.recipe.evaluate.decode
    # A drawn seed would make every evaluation another one.
    decode = replace(
        decode,
        block_length=decode.block_length or recipe.block_length,
        seed=recipe.seed if decode.seed is None else decode.seed,
    )
    if recipe.baseline:
        settings = replace(decode, residual=False, residual_source="self", start=None)
        yield Arm(
            name=BASELINE,
            title="SeqD",
            stage="baseline",
            checkpoint=ctx.checkpoint("baseline"),
            reference=None,
            settings=settings,
        )
    for stage in ("target", *(f"target-{name}" for name in recipe.variants)):
        variant = stage.removeprefix("target").replace("-", " ")
        trained = recipe.training(stage).residual
        if trained is not None and not trained.feeds_back:
            yield Arm(
                name=stage,
                title=f"No residual{variant}",
                stage=stage,
                checkpoint=ctx.checkpoint(stage),
                reference=None,
                settings=replace(decode, residual=False, residual_source="self", start=None),
            )
            continue
        for start in dict.fromkeys(recipe.evaluate.starts):
            warm = start == "reference" or decode.residual_source == "reference"
            yield Arm(
                name=f"{stage}/{start}",
                title=f"RCD{variant}, {start} start",
                stage=stage,
                checkpoint=ctx.checkpoint(stage),
                reference=ctx.checkpoint("reference") if warm else None,
                settings=replace(decode, residual=True, start=start),
            )


def _decode(ctx: StageContext, plan: Plan) -> pa.Table:
    """All pieces of work as one table in the order of arm, threshold and example, whoever did them when."""
    import ray.data

    resources = ctx.recipe.resources
    pieces: Any = (
        ray.data.range(len(plan.work), override_num_blocks=len(plan.work))
        .map_batches(
            DecodeActor,
            fn_constructor_args=(plan,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(resources.evaluate_actors, len(plan.work))),
            num_cpus=resources.cpus_per_worker,
            num_gpus=resources.gpus_per_worker,
        )
        .iter_batches(batch_size=None, batch_format="pyarrow")
    )
    total = sum(piece.last - piece.first for piece in plan.work)
    schema = DECODED
    tables, done, said, started = [schema.empty_table()], 0, 0, time.monotonic()
    for table in pieces:
        tables.append(table.cast(schema))
        done += len(table)
        if done * 10 // total > said:
            said = done * 10 // total
            rate = done / (time.monotonic() - started)
            left = f", {rate:.0f} a second, {(total - done) / rate:.0f} s left" if done < total else ""
            ctx.console.print(f"  evaluate: {done} of {total} problems decoded{left}")
    order = pa.array([arm.name for arm in plan.arms])
    merged = pa.concat_tables(tables)
    rank = pc.index_in(merged["arm"], value_set=order)
    keys = [("rank", "ascending"), ("threshold", "ascending"), ("example_id", "ascending")]
    return merged.append_column("rank", rank).sort_by(keys).select(schema.names)


def _columns(table: pa.Table, *names: str) -> list[list[Any]]:
    return [table[name].to_pylist() for name in names]


# -- statistics


def analyse(ctx: StageContext, plan: Plan, table: pa.Table, settings: dict[str, Any]) -> dict[str, Any]:
    """results.json: what was decoded and how, a curve per arm, each RCD arm against SeqD."""
    outcomes = collect(table.to_pylist())
    weights = dict(zip(*_columns(table, "arm", "reference_weight"), strict=True))
    residuals = ctx.recipe.residuals()
    arms, comparisons = [], []
    for arm in plan.arms:
        section = "target.residual" if arm.stage == "target" else f"variants.{arm.stage.removeprefix('target-')}"
        arms.append(
            {
                "name": arm.name,
                "title": arm.title,
                "model": arm.stage,
                "start": arm.settings.start,
                "trained_with": asdict(residuals[section]) if section in residuals else None,
                "decode": {k: v for k, v in settings[arm.name].items() if k != "confidence_threshold"},
                "reference_weight": weights[arm.name],
                "curve": [asdict(point) for point in curve(outcomes[arm.name], weights[arm.name])],
            }
        )
        if arm.name != BASELINE and BASELINE in outcomes:
            found = compare(
                outcomes[BASELINE], outcomes[arm.name], weights[arm.name], ACCURACY_LEVEL, RESAMPLES, ctx.recipe.seed
            )
            comparisons.append({"arm": arm.name, "baseline": BASELINE, **asdict(found)})
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": ctx.recipe.name,
        "task": plan.task,
        "num_problems": len(next(iter(outcomes.values())).example_ids),
        "thresholds": sorted(ctx.recipe.evaluate.thresholds),
        "arms": arms,
        "comparisons": comparisons,
        "statistics": {
            "accuracy_interval": "Wilson, 95 %",
            "comparison_interval": "paired bootstrap over problems, percentile, 95 %",
            "resamples": RESAMPLES,
            "seed": ctx.recipe.seed,
            "reference_weight": "cost of a reference pass in target passes, taken as the ratio of parameters",
        },
    }


if __name__ == "__main__":
    from pipelines.driver import stage_main

    stage_main("evaluate")
