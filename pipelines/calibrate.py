"""Stage `calibrate`: chooses T_res for every target, so that alpha in decoding is distributed as in its training.

    python pipelines/calibrate.py --recipe demo

Reads the models of the targets, the baselines and the reference, and held-out examples of the training split (never
test problems). Writes <run>/calibrate/calibration.json (T_res, the search, figures) and report.html. The manifest has
T_res by stage, which evaluate and deploy decode with; the targets' models are not changed. Of a baseline it measures
what its discarded predictions knew (Fig. 2 of arXiv 2601.22954). Each model is one Ray task.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the slow imports: the driver imports this file again when its stage runs
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not pipelines/, whose file names are too common
    from pipelines.run.driver import stage_main

    stage_main("calibrate")

import ray

from pipelines.calibration.inputs import held_out_problems, make_jobs
from pipelines.calibration.job import CalibrationJob, calibrate_model
from pipelines.report.calibration import html_page, summary_line
from pipelines.run.directory import StageContext
from pipelines.run.progress import Countdown, StillWorking
from rcd_core.io import storage
from rcd_core.io.retries import be_patient
from rcd_core.tasks import Problem


def run(ctx: StageContext) -> dict[str, Any]:
    """Calibrate and report. Summary: T_res by stage, which is all that later stages depend on."""
    jobs = make_jobs(ctx)
    problems = held_out_problems(ctx, max(job.num_examples for job in jobs))
    computed = dict(_compute(ctx, jobs, problems))
    results = {job.stage: computed[job.stage] for job in jobs}
    storage.write_json(storage.join(ctx.directory, "calibration.json"), results)
    page = html_page(f"{ctx.recipe.name}: calibration", results)
    storage.write_bytes(storage.join(ctx.directory, "report.html"), page.encode())
    temperatures = {job.stage: results[job.stage]["residual_temperature"] for job in jobs if job.calibrated}
    return {"residual_temperatures": temperatures, "fingerprint": temperatures}


def report(ctx: StageContext) -> None:
    """Print each target's T_res and the path of the report."""
    results = storage.read_json(storage.join(ctx.directory, "calibration.json"))
    for stage, result in results.items():
        if "residual_temperature" in result:
            ctx.console.print(f"{stage}: {summary_line(result)}", markup=False, soft_wrap=True)
    ctx.console.print(f"calibration: {storage.join(ctx.directory, 'report.html')}", markup=False, soft_wrap=True)


def _patient(job: CalibrationJob, problems: list[Problem]) -> dict[str, Any]:
    be_patient()
    return calibrate_model(job, problems)


def _compute(ctx: StageContext, jobs: list[CalibrationJob], problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    """Yields (stage, result) as tasks finish, at most resources.evaluate_actors at a time. Ray retries lost ones."""
    resources = ctx.recipe.resources
    task = ray.remote(
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        resources=resources.custom_resources("calibrate"),
    )(_patient)
    shared, waiting = ray.put(problems), list(jobs)
    running: dict[Any, CalibrationJob] = {}
    countdown = Countdown(ctx.console, ctx.stage, len(jobs), "models")
    while waiting or running:
        while waiting and len(running) < resources.evaluate_actors:
            job = waiting.pop(0)
            running[task.options(name=f"calibrate {job.stage}").remote(job, shared)] = job
        with StillWorking(ctx.console, f"calibrate: {', '.join(job.stage for job in running.values())}"):
            (done,), _ = ray.wait(list(running))
        job = running.pop(done)
        result = ray.get(done)
        line = summary_line(result) if job.calibrated else "discarded predictions measured"
        ctx.console.print(f"  calibrate: {job.stage}: {line}", markup=False, soft_wrap=True)
        countdown.add()
        yield job.stage, result
