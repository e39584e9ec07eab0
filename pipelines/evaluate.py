"""evaluate: decode the held-out problems with every model over a sweep of confidence thresholds, and compare.

    python pipelines/evaluate.py --recipe demo

Arms: SeqD (the baseline, plain block decoding) and RCD (every target, once per start), each once per block length. All
arms solve the same problems at the same thresholds, so they are compared in pairs. Writes results.parquet (a row per
arm, threshold, problem and sample), results.json (curves, comparisons, settings), two plots and report.html. Until that
is done, parts/ holds what has been decoded: a killed evaluation goes on with what is missing.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.evaluation.actor import DECODED, ROWS, Arm, DecodeActor, Plan, Work
from pipelines.evaluation.parts import read_parts
from pipelines.evaluation.results import ArmInfo, analyse
from pipelines.recipe.settings_files import provenance, provenance_line, provenance_section
from pipelines.report.evaluation import html_report, plots_of, print_tables
from pipelines.run.directory import StageContext
from rcd_core.io import storage

BASELINE = "seqd"
FLUSH_S = 5.0  # what a kill costs, at most, of answers that were finished
_KEYS = ["arm", "threshold", "example_id", "sample"]
Answer = tuple[str, float, int]  # arm, threshold, item


def run(ctx: StageContext) -> dict[str, Any]:
    """Decode, compare, write. The summary repeats accuracies and rates, so that a manifest tells what came out."""
    arms = tuple(_arms(ctx))
    if ctx.recipe.calibrate is None and any(_takes_t_res(arm) for arm in arms):
        ctx.console.print("  evaluate: T_res is not calibrated in this run (recipe section `calibrate`)")
    parts = storage.join(ctx.directory, "parts")
    done = _done(read_parts(parts, DECODED, _KEYS))
    if done:
        ctx.console.print(f"  evaluate: {len(done)} answers were decoded before the interruption")
    plan = make_plan(ctx, arms, done)
    _decode(ctx, plan)
    decoded = _in_order(read_parts(parts, DECODED, _KEYS), arms)
    table = decoded.select(ROWS.names)
    with storage.open_output(storage.join(ctx.directory, "results.parquet")) as stream:
        pq.write_table(table, stream, compression="zstd")
    results = analyse(
        recipe=ctx.recipe.name,
        task=plan.task,
        seed=ctx.recipe.seed,
        arms=[arm.info for arm in arms],
        table=table,
        settings={arm: json.loads(text) for arm, text in _distinct(decoded, "arm", "settings")},
        accuracy_levels=ctx.recipe.evaluate.accuracy_levels,
        hardware=_hardware(ctx, decoded),
    ) | {"settings_file": provenance(ctx.recipe)}
    _write(ctx, results)
    storage.remove(parts)
    kept = ("threshold", "accuracy", "tokens_per_pass", "tokens_per_forward")
    curves = {arm["name"]: [{name: point[name] for name in kept} for point in arm["curve"]] for arm in results["arms"]}
    return {"num_problems": results["num_problems"], "num_samples": results["num_samples"], "curves": curves}


def report(ctx: StageContext) -> None:
    """Print the tables of a finished evaluation and where its files lie."""
    results = storage.read_json(storage.join(ctx.directory, "results.json"))
    print_tables(results, ctx.console)
    if line := provenance_line(results.get("settings_file")):
        ctx.console.print(line, soft_wrap=True, markup=False)
    for what, name in (("plot", "pareto.png"), ("report", "report.html"), ("numbers", "results.json")):
        ctx.console.print(f"{what}: {storage.join(ctx.directory, name)}", soft_wrap=True, markup=False)


def make_plan(ctx: StageContext, arms: Sequence[Arm], done: Set[Answer]) -> Plan:
    """What is left to decode: for every arm and threshold a piece per actor, fewer where a batch holds more."""
    recipe, evaluate = ctx.recipe, ctx.recipe.evaluate
    summary = ctx.input("prepare")["summary"]
    num_items = min(evaluate.num_examples or sys.maxsize, summary["counts"]["test"]["examples"]) * evaluate.samples
    work: list[Work] = []
    for number, arm in enumerate(arms):
        for threshold in sorted(evaluate.thresholds, reverse=True):  # most passes first: no long tail at the end
            left = [item for item in range(num_items) if (arm.info.name, threshold, item) not in done]
            size = max(evaluate.batch_size, -(-len(left) // recipe.resources.evaluate_actors))
            pieces = -(-len(left) // size)
            cuts = [len(left) * i // pieces for i in range(pieces + 1)] if pieces else []
            work += [
                Work(arm=number, threshold=threshold, items=tuple(left[first:last]))
                for first, last in zip(cuts, cuts[1:], strict=False)
            ]
    directory = ctx.input_dir("prepare")
    return Plan(
        task=recipe.data.task_of("test"),
        run_code=evaluate.run_code,
        tokenizer=storage.join(directory, "tokenizer"),
        files=tuple(storage.join(directory, "test", name) for name in summary["test"]),
        arms=tuple(arms),
        work=tuple(work),
        samples=evaluate.samples,
        batch_size=evaluate.batch_size,
        threads=max(1, int(recipe.resources.cpus_per_worker)),
        parts=storage.join(ctx.directory, "parts"),
        name=uuid.uuid4().hex[:8],
        flush_s=FLUSH_S,
    )


def _takes_t_res(arm: Arm) -> bool:
    """Whether the checkpoint's T_res decides how its own predictions are fed back."""
    settings = arm.settings
    return settings.residual and settings.residual_source == "self" and settings.residual_temperature is None


def _done(decoded: pa.Table) -> set[Answer]:
    return set(_distinct(decoded, "arm", "threshold", "item"))


def _distinct(decoded: pa.Table, *names: str) -> list[tuple[Any, ...]]:
    found = decoded.group_by(list(names)).aggregate([])
    return list(zip(*(found[name].to_pylist() for name in names), strict=True))


# -- arms


def _arms(ctx: StageContext) -> Iterator[Arm]:
    """Every model in every way it is decoded; of each block length the baseline first."""
    evaluate = ctx.recipe.evaluate
    lengths = evaluate.block_lengths or (evaluate.decode.block_length or ctx.recipe.block_length,)
    for length in lengths:
        name, title = (f"/b{length}", f", block {length}") if len(lengths) > 1 else ("", "")
        for arm in _arms_of(ctx, length):
            base = arm.info.baseline
            info = replace(
                arm.info, name=arm.info.name + name, title=arm.info.title + title, baseline=base and base + name
            )
            yield replace(arm, info=info)


def _arms_of(ctx: StageContext, block_length: int) -> Iterator[Arm]:
    recipe, decode = ctx.recipe, ctx.recipe.evaluate.decode
    # A drawn seed would make every evaluation another one.
    decode = replace(decode, block_length=block_length, seed=recipe.seed if decode.seed is None else decode.seed)
    plain = replace(decode, residual=False, residual_source="self", start=None)
    if recipe.baseline:
        yield _arm(ctx, BASELINE, "SeqD", "baseline", plain)
    for name in recipe.baselines:
        yield _arm(ctx, f"{BASELINE}-{name}", f"SeqD {name}", f"baseline-{name}", plain)
    for stage in ("target", *(f"target-{name}" for name in recipe.variants)):
        variant = stage.removeprefix("target").replace("-", " ")
        trained = recipe.residual(stage)
        if trained is not None and not trained.feeds_back:
            yield _arm(ctx, stage, f"No residual{variant}", stage, plain)
            continue
        for start in dict.fromkeys(recipe.evaluate.starts):
            settings = replace(decode, residual=True, start=start)
            yield _arm(ctx, f"{stage}/{start}", f"RCD{variant}, {start} start", stage, settings)
    for name, extra in recipe.evaluate.arms.items():
        seed = decode.seed if extra.decode.seed is None else extra.decode.seed
        settings = replace(extra.decode, block_length=block_length, seed=seed)
        yield _arm(ctx, name, extra.title or name.replace("_", " "), extra.model, settings)


def _arm(ctx: StageContext, name: str, title: str, stage: str, settings: Any) -> Arm:
    trained = ctx.recipe.residual(stage)
    warm = settings.residual and "reference" in (settings.start, settings.residual_source)
    return Arm(
        info=ArmInfo(
            name=name,
            title=title,
            model=stage,
            baseline=BASELINE if ctx.recipe.baseline and name != BASELINE else None,
            start=settings.start,
            block_length=settings.block_length,
            trained_with=asdict(trained) if trained else None,
        ),
        checkpoint=ctx.checkpoint(stage),
        reference=ctx.checkpoint("reference") if warm else None,
        settings=settings,
    )


# -- decoding


def _decode(ctx: StageContext, plan: Plan) -> None:
    """Have actors decode all pieces of work. Their answers lie in plan.parts afterwards."""
    if not plan.work:
        return
    import ray.data

    resources = ctx.recipe.resources
    numbers = [{"id": number} for number in range(len(plan.work))]
    pieces: Any = (
        # From here, not from a task of Ray Data: where the actors have taken all CPUs it would wait for ever.
        ray.data.from_items(numbers, override_num_blocks=len(numbers))
        .map_batches(
            DecodeActor,
            fn_constructor_args=(plan,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(resources.evaluate_actors, len(plan.work))),
            num_cpus=resources.cpus_per_worker,
            num_gpus=resources.gpus_per_worker,
            resources=resources.custom_resources("evaluate"),
        )
        .iter_batches(batch_size=None, batch_format="pyarrow")
    )
    total = sum(len(piece.items) for piece in plan.work)
    done, said, started = 0, 0, time.monotonic()
    for piece in pieces:
        done += pc.sum(piece["answers"]).as_py()
        if done * 10 // total > said:
            said = done * 10 // total
            rate = done / (time.monotonic() - started)
            left = f", {rate:.0f} a second, {(total - done) / rate:.0f} s left" if done < total else ""
            ctx.console.print(f"  evaluate: {done} of {total} answers decoded{left}")


def _in_order(decoded: pa.Table, arms: Sequence[Arm]) -> pa.Table:
    """By arm as they are listed, threshold, example and sample, whoever decoded them when."""
    rank = pc.index_in(decoded["arm"], value_set=pa.array([arm.info.name for arm in arms]))
    keys = [("rank", "ascending"), *((key, "ascending") for key in _KEYS[1:])]
    return decoded.append_column("rank", rank).sort_by(keys)


def _hardware(ctx: StageContext, decoded: pa.Table) -> dict[str, Any]:
    """On what it was decoded. More than one device where a run went on elsewhere."""
    return {
        "devices": [json.loads(text) for (text,) in sorted(_distinct(decoded, "hardware"))],
        "actors": ctx.recipe.resources.evaluate_actors,
        "batch_size": ctx.recipe.evaluate.batch_size,
    }


def _write(ctx: StageContext, results: dict[str, Any]) -> None:
    storage.write_json(storage.join(ctx.directory, "results.json"), results)
    plots = plots_of(results)
    for name, (light, _) in plots.items():
        storage.write_bytes(storage.join(ctx.directory, f"{name}.png"), light)
    page = html_report(results, plots, _sections(ctx))
    storage.write_bytes(storage.join(ctx.directory, "report.html"), page.encode())


def _sections(ctx: StageContext) -> list[tuple[str, str]]:
    """The settings file of the recipe, and what the stage calibrate has to show, where it has them."""
    found = provenance_section(provenance(ctx.recipe))
    if "calibrate" not in ctx.inputs:
        return found
    from pipelines.report.calibration import sections

    return found + sections(storage.read_json(storage.join(ctx.input_dir("calibrate"), "calibration.json")))


if __name__ == "__main__":
    from pipelines.run.driver import stage_main

    stage_main("evaluate")
