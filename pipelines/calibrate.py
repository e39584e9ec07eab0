"""calibrate: choose T_res for every target, so that its own alpha in decoding is spread as the reference's in training.

    python pipelines/calibrate.py --recipe demo

On held-out examples of the training split, never on test problems. Each target is one Ray task. Writes
calibration.json (T_res, the whole curve, and what the report shows), report.html, and rcd_calibration.json into each
target's model, from where decoding takes T_res. The baseline is looked at as well: what its discarded predictions knew
(the paper's Fig. 2).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataclasses import replace

from pipelines.calibration.job import CalibrationJob, calibrate_model, store, synthetic_problems
from pipelines.data.sources import columns_of, local_sources
from pipelines.report.calibration import html_page, summary_line
from pipelines.run.directory import StageContext
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.tasks import Problem, get_task
from rcd_core.tasks.rows import read_rows
from rcd_core.text.encoding import content_id


def run(ctx: StageContext) -> dict[str, Any]:
    """Calibrate, store, report. Summary: T_res by stage, which is also all that later stages depend on."""
    jobs = make_jobs(ctx)
    problems = held_out(ctx, max(job.num_examples for job in jobs))
    computed = dict(_compute(ctx, jobs, problems))
    found = {job.stage: computed[job.stage] for job in jobs}
    for job in jobs:
        if job.calibrated:
            store(job.checkpoint, found[job.stage])
    storage.write_json(storage.join(ctx.directory, "calibration.json"), found)
    page = html_page(f"{ctx.recipe.name}: calibration", found)
    storage.write_bytes(storage.join(ctx.directory, "report.html"), page.encode())
    temperatures = {job.stage: found[job.stage]["residual_temperature"] for job in jobs if job.calibrated}
    return {"residual_temperatures": temperatures, "fingerprint": temperatures}


def report(ctx: StageContext) -> None:
    """Print each target's T_res and where the report lies."""
    found = storage.read_json(storage.join(ctx.directory, "calibration.json"))
    for stage, one in found.items():
        if "residual_temperature" in one:
            ctx.console.print(f"{stage}: {summary_line(one)}", markup=False, soft_wrap=True)
    ctx.console.print(f"calibration: {storage.join(ctx.directory, 'report.html')}", markup=False, soft_wrap=True)


def make_jobs(ctx: StageContext) -> list[CalibrationJob]:
    """One per model among the inputs: a pure function of the recipe and the manifests."""
    recipe, settings = ctx.recipe, ctx.recipe.calibrate
    assert settings is not None
    decode = settings.decode
    decode = replace(
        decode,
        block_length=decode.block_length or recipe.block_length,
        seed=recipe.seed if decode.seed is None else decode.seed,
    )
    jobs = []
    for stage in ctx.inputs:
        if not stage.startswith(("target", "baseline")):
            continue
        residual = recipe.residual(stage)
        feeds_back = residual is not None and residual.feeds_back
        learned_from = residual is not None and residual.source in ("signals", "online")
        jobs.append(
            CalibrationJob(
                stage=stage,
                checkpoint=ctx.checkpoint(stage),
                reference=ctx.checkpoint("reference") if learned_from else None,
                calibrated=feeds_back,
                tokenizer=storage.join(ctx.input_dir("prepare"), "tokenizer"),
                task=recipe.data.task,
                num_examples=settings.num_examples,
                decode=decode if feeds_back else replace(decode, residual=False, start=None),
                noise=recipe.noise,
                signal_rule=recipe.signals.rule,
                match=settings.match,
                pad_multiple=recipe.data.pad_multiple or recipe.block_length,
                max_length=recipe.data.max_length,
                run_code=recipe.evaluate.run_code,
                threads=max(1, int(recipe.resources.cpus_per_worker)),
            )
        )
    return jobs


def held_out(ctx: StageContext, most: int) -> list[Problem]:
    """Problems of the training split that nothing was trained on: synthetic ones beyond the training's, of files those
    that prepare has held out (data.num_validation), found again by their content."""
    recipe = ctx.recipe
    sources = local_sources(ctx, "train")
    if not sources:
        return list(islice(synthetic_problems(recipe.data.task, recipe.seed), most))
    try:
        task, columns = get_task(recipe.data.task), columns_of(recipe, "train")
        wanted = set(islice(_validation_ids(ctx), most))
        found: dict[str, Problem] = {}
        for row in (row for source in sources for row in read_rows(source.path, columns)):
            if len(found) == len(wanted):
                break
            try:
                problem = task.problem(row.values) if row.values else None
            except UserError:
                continue
            if problem is not None and (name := content_id(problem)) in wanted:
                found.setdefault(name, problem)
    finally:
        storage.remove(storage.join(ctx.directory, "sources"))
    if not found:
        raise UserError("calibrate: data.train holds none of the examples that prepare has held out; did it change?")
    return [found[name] for name in sorted(found)]


def _validation_ids(ctx: StageContext) -> Iterator[str]:
    import pyarrow.parquet as pq

    for name in ctx.input("prepare")["summary"]["validation"]:
        with storage.open_input(storage.join(ctx.input_dir("prepare"), "validation", name)) as stream:
            yield from pq.read_table(stream, columns=["example_id"])["example_id"].to_pylist()


def _compute(ctx: StageContext, jobs: list[CalibrationJob], problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    """(stage, what was found), each when it is there; as many at a time as there may be evaluation actors. Ray computes
    one again whose worker was lost."""
    import ray

    resources = ctx.recipe.resources
    task = ray.remote(
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        resources=resources.custom_resources("calibrate"),
    )(calibrate_model)
    shared, todo = ray.put(problems), list(jobs)
    running: dict[Any, CalibrationJob] = {}
    while todo or running:
        while todo and len(running) < resources.evaluate_actors:
            job = todo.pop(0)
            running[task.options(name=f"calibrate {job.stage}").remote(job, shared)] = job
        (done,), _ = ray.wait(list(running))
        job = running.pop(done)
        found = ray.get(done)
        line = summary_line(found) if job.calibrated else "discarded predictions looked at"
        ctx.console.print(f"  calibrate: {job.stage}: {line}", markup=False, soft_wrap=True)
        yield job.stage, found


if __name__ == "__main__":
    from pipelines.run.driver import stage_main

    stage_main("calibrate")
