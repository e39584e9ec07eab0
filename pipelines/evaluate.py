"""evaluate: decode the held-out problems with every model over a sweep of confidence thresholds, and compare.

    python pipelines/evaluate.py --recipe demo

Methods: SeqD (the baseline, block decoding without residuals) and RCD (every target, once per start), each once per
block length. All methods solve the same problems at the same thresholds, so comparisons are paired. Writes
results.parquet (a row per method, threshold, problem and sample), results.json (curves, comparisons, settings), two
plots, report.html and report.md. The entries of evaluate.tasks come after the test examples, each with its own
results-NAME.parquet; results.json and the reports have all of them. thrown_away.json measures what the
baseline's passes discard. While it runs, parts/ and parts-NAME/ have the answers decoded so far, from which a killed
evaluation resumes.
"""

from __future__ import annotations

import itertools
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the slow imports: the driver imports this file again when its stage runs
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not pipelines/, whose file names are too common
    from pipelines.run.driver import stage_main

    stage_main("evaluate")

import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.evaluation.actor import DECODED, ROWS, DecodeActor, Method, Piece, Plan
from pipelines.evaluation.answers import KEY, read_answers
from pipelines.evaluation.methods import make_methods, uses_t_res, with_t_res
from pipelines.evaluation.results import analyse
from pipelines.evaluation.thrown_away import thrown_away
from pipelines.ray_cluster.placement import placement_groups
from pipelines.ray_cluster.resources import describe_bundles
from pipelines.ray_cluster.waiting import WaitReporter
from pipelines.recipe.settings_files import provenance
from pipelines.report.calibration import summary_lines
from pipelines.report.costs import training_costs
from pipelines.report.evaluation import print_tables, write_evaluation
from pipelines.report.examples import examples_of
from pipelines.run.directory import StageContext
from pipelines.run.progress import Countdown
from rcd_core.io import storage

PIECE_SIZE = (
    32  # most answers of a piece: bounds the files of an evaluation, and the work between two lines of progress
)
FLUSH_S = 5.0  # a kill loses finished answers of at most this time
Answer = tuple[str, float, int]  # method, threshold, item


def run(ctx: StageContext) -> dict[str, Any]:
    """Decode, compare, write. The summary repeats accuracies and rates, so that the manifest has them."""
    if ctx.recipe.calibrate is None and any(uses_t_res(method) for method in make_methods(ctx)):
        ctx.console.print("  evaluate: T_res is not calibrated in this run (recipe section `calibrate`)")
    results = _evaluate(ctx)
    tasks = {name: _evaluate(ctx, name) for name in ctx.recipe.evaluate.tasks}
    results |= {"tasks": tasks} if tasks else {}
    results["costs"] = training_costs(ctx.recipe, ctx.run, {m.info.name: _used(ctx, m) for m in make_methods(ctx)})
    if "calibrate" in ctx.inputs:
        calibration = storage.read_json(storage.join(ctx.input_dir("calibrate"), "calibration.json"))
        results["calibration"] = summary_lines(calibration)
    write_evaluation(ctx.directory, results)
    extra = {"tasks": {name: _summary(one) for name, one in tasks.items()}} if tasks else {}
    return _summary(results) | extra


def _evaluate(ctx: StageContext, task: str | None = None) -> dict[str, Any]:
    """The entry of results.json for the test examples, or for an entry of evaluate.tasks."""
    suffix, problems = (f"-{task}", f"prepare-{task}") if task else ("", "prepare")
    ctx = replace(ctx, recipe=ctx.recipe.for_task(task)) if task else ctx
    what = f"evaluate, task {task}" if task else "evaluate"
    methods = tuple(with_t_res(ctx, make_methods(ctx)))
    parts = storage.join(ctx.directory, f"parts{suffix}")
    done = set(_distinct(read_answers(parts, DECODED, list(KEY)), "arm", "threshold", "item"))
    if done:
        ctx.console.print(f"  {what}: resuming, {len(done)} answers are already decoded")
    plan = make_plan(ctx, methods, done, problems, parts)
    _decode(ctx, plan)
    decoded = _in_order(read_answers(parts, DECODED, list(KEY)), methods)
    table = decoded.select(ROWS.names)
    with storage.open_output(storage.join(ctx.directory, f"results{suffix}.parquet")) as stream:
        pq.write_table(table, stream, compression="zstd")
    results = analyse(
        recipe=ctx.recipe.name,
        task=plan.task,
        seed=ctx.recipe.seed,
        methods=[method.info for method in methods],
        table=table,
        settings={name: json.loads(text) for name, text in _distinct(decoded, "arm", "settings")},
        accuracy_levels=ctx.recipe.evaluate.accuracy_levels,
        hardware=_hardware(ctx, decoded),
        grader=ctx.recipe.evaluate.grader,
    )
    return results | {
        "settings_file": provenance(ctx.recipe),
        "examples": examples_of(results, table, partial(_problems, plan.files)),
        "thrown_away": thrown_away(ctx, plan, suffix),
    }


def _summary(results: Mapping[str, Any]) -> dict[str, Any]:
    names = ("threshold", "accuracy", "tokens_per_pass", "tokens_per_forward")
    curves = {arm["name"]: [{name: point[name] for name in names} for point in arm["curve"]] for arm in results["arms"]}
    return {"num_problems": results["num_problems"], "num_samples": results["num_samples"], "curves": curves}


def _problems(files: Sequence[str], ids: Sequence[str]) -> dict[str, dict[str, str]]:
    """Prompt and right answer of test problems by their ids."""
    found: dict[str, dict[str, str]] = {}
    for file in files:
        with storage.open_input(file) as stream:
            table = pq.read_table(stream, columns=["example_id", "prompt", "answer"])
        rows = table.filter(pc.is_in(table["example_id"], value_set=pa.array(ids, pa.string())))
        found |= {row["example_id"]: row for row in rows.to_pylist()}
    return found


def _used(ctx: StageContext, method: Method) -> list[str]:
    """The stages whose results a method is decoded with."""
    calibrated = "calibrate" in ctx.inputs and uses_t_res(method)
    return [
        method.info.model,
        *(["reference"] if method.reference else []),
        *(["calibrate"] if calibrated else []),
    ]


def report(ctx: StageContext) -> None:
    """Print the tables of a finished evaluation and the paths of its files."""
    print_tables(storage.read_json(storage.join(ctx.directory, "results.json")), ctx.console)
    for what, name in (
        ("plot", "pareto.png"),
        ("report", "report.html"),
        ("the same as Markdown", "report.md"),
        ("numbers", "results.json"),
    ):
        ctx.console.print(f"{what}: {storage.join(ctx.directory, name)}", soft_wrap=True, markup=False)


def make_plan(
    ctx: StageContext, methods: Sequence[Method], done: Set[Answer], problems: str = "prepare", parts: str | None = None
) -> Plan:
    """The answers left to decode, method by method and threshold by threshold, in pieces that keep every actor busy.

    problems: the stage that made them. parts: directory of the answers.
    """
    recipe, evaluate = ctx.recipe, ctx.recipe.evaluate
    summary = ctx.input(problems)["summary"]
    num_items = min(evaluate.num_examples or sys.maxsize, summary["counts"]["test"]["examples"]) * evaluate.samples
    left = {
        # Highest thresholds take the most passes: first, so that no actor ends much later than the others.
        (number, threshold): [i for i in range(num_items) if (method.info.name, threshold, i) not in done]
        for number, method in enumerate(methods)
        for threshold in sorted(evaluate.thresholds, reverse=True)
    }
    size = min(PIECE_SIZE, max(1, -(-sum(map(len, left.values())) // recipe.resources.evaluate_actors)))
    pieces: list[Piece] = []
    for (number, threshold), items in left.items():
        count = -(-len(items) // size)
        cuts = [len(items) * i // count for i in range(count + 1)] if count else []
        pieces += [
            Piece(method=number, threshold=threshold, items=tuple(items[a:b])) for a, b in itertools.pairwise(cuts)
        ]
    return Plan(
        task=recipe.data.task_of("test"),
        grader=evaluate.grader,
        attention=evaluate.attention,
        weights=evaluate.weights,
        run_code=evaluate.run_code,
        tokenizer=storage.join(ctx.input_dir("prepare"), "tokenizer"),
        files=tuple(storage.join(ctx.input_dir(problems), "test", name) for name in summary["test"]),
        methods=tuple(methods),
        pieces=tuple(pieces),
        samples=evaluate.samples,
        batch_size=evaluate.batch_size,
        threads=max(1, int(recipe.resources.cpus_per_worker)),
        gpus=recipe.resources.gpus_per_worker,
        bundles=(recipe.resources.worker_bundle("evaluate"),) * recipe.resources.tensor_parallel,
        parts=parts or storage.join(ctx.directory, "parts"),
        name=uuid.uuid4().hex[:8],
        flush_s=FLUSH_S,
        process=recipe.process,
    )


def _distinct(decoded: pa.Table, *names: str) -> list[tuple[Any, ...]]:
    groups = decoded.group_by(list(names)).aggregate([])
    return list(zip(*(groups[name].to_pylist() for name in names), strict=True))


# -- decoding


def _decode(ctx: StageContext, plan: Plan) -> None:
    """Decode all pieces with a pool of actors, which write the answers below plan.parts."""
    if not plan.pieces:
        return
    with placement_groups(plan.bundles) as place:
        _run_actors(ctx, plan, place)


def _run_actors(ctx: StageContext, plan: Plan, place: Callable[[], dict[str, Any]] | None) -> None:
    import ray.data

    resources, numbers = ctx.recipe.resources, [{"id": number} for number in range(len(plan.pieces))]
    actors = min(resources.evaluate_actors, len(plan.pieces))
    # from_items runs in the driver: a read task of Ray Data would wait forever if the actors took all CPUs.
    data = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map_batches(
        DecodeActor,
        fn_constructor_args=(plan,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=actors, max_concurrent_calls_per_actor=plan.pieces_at_once, enable_true_multi_threading=True
        ),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        resources=resources.custom_resources("evaluate"),
        ray_remote_args_fn=place,
    )
    # Ray ends a job that moves no block for half an hour. Long answers of a large model can take longer.
    data.context.execution_no_progress_timeout_s = -1
    batches: Any = data.iter_batches(batch_size=None, batch_format="pyarrow")
    total = sum(len(piece.items) for piece in plan.pieces)
    countdown = Countdown(ctx.console, ctx.stage, total, "answers decoded")
    pool = describe_bundles(list(plan.bundles) * actors)
    what = f"evaluate: waiting for {len(plan.pieces[0].items)} answers, of up to {pool},"
    with WaitReporter(ctx.console, what, len(plan.pieces)) as waiting:
        for batch in batches:
            waiting.progress()
            countdown.add(pc.sum(batch["answers"]).as_py())


def _in_order(decoded: pa.Table, methods: Sequence[Method]) -> pa.Table:
    """Sorted by method in the given order, threshold, example and sample."""
    rank = pc.index_in(decoded["arm"], value_set=pa.array([method.info.name for method in methods]))
    keys = [("rank", "ascending"), *((key, "ascending") for key in KEY[1:])]
    return decoded.append_column("rank", rank).sort_by(keys)


def _hardware(ctx: StageContext, decoded: pa.Table) -> dict[str, Any]:
    """devices: more than one if the actors differ, or if a run was resumed elsewhere."""
    return {
        "devices": [json.loads(text) for (text,) in sorted(_distinct(decoded, "hardware"))],
        "actors": ctx.recipe.resources.evaluate_actors,
        "batch_size": ctx.recipe.evaluate.batch_size,
    }
