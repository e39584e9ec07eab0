"""Stages `signals` and `signals-<round>`: the frozen reference's predictions at every masked position of the training
rows, or with target.rounds those of the target as the round before left it.

    python pipelines/precompute.py --recipe demo
    python pipelines/precompute.py --recipe demo --repair     # check every shard's bytes, compute damaged ones again

Reads the examples of the stage `prepare` and the checkpoint of `reference`. Writes <run>/signals/shard-*.parquet, a
JSON sidecar per shard, an index of these, and bad_rows.parquet. Shards are planned before anything is computed
(signals/plan.py); Ray Data maps a pool of reference actors (signals/actor.py) over their numbers. A shard with a valid
sidecar is skipped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the slow imports: the driver imports this file again when its stage runs
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not pipelines/, whose file names are too common
    from pipelines.run.driver import stage_main

    stage_main("signals", "signals-*")

import ray.data
from ray.data import ActorPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError

from pipelines.ray_cluster.resources import describe_bundles
from pipelines.ray_cluster.waiting import WaitReporter
from pipelines.run.directory import StageContext
from pipelines.run.progress import Countdown
from pipelines.signals.actor import SignalActor
from pipelines.signals.files import remove_leftovers, remove_shard
from pipelines.signals.plan import SignalJob, make_job
from pipelines.signals.sidecars import Sidecars
from pipelines.signals.summary import SignalSummary
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.io.threads import in_threads
from rcd_core.training.data.signal_cache import damage


def run(ctx: StageContext) -> dict[str, Any]:
    """Compute the missing shards. Summary: what the rows are and how to read them; the training checks it."""
    job = make_job(ctx)
    listed = storage.listing(job.directory)
    remove_leftovers(job.directory, listed)
    summary, sidecars = SignalSummary(ctx, job), Sidecars(job)
    for shard, sidecar in sidecars.complete(listed):
        summary.add(shard, sidecar)
    missing = [shard for shard in range(job.num_shards) if shard not in summary.shards]
    num_done = job.num_shards - len(missing)
    if num_done:
        ctx.console.print(f"  signals: {num_done} of {job.num_shards} shards exist already")
    countdown = Countdown(ctx.console, ctx.stage, job.num_shards, "shards", num_done)
    for shard, sidecar in _compute(ctx, job, missing):
        summary.add(shard, sidecar)
        sidecars.add(shard, sidecar)
        countdown.add()
    sidecars.save()
    if not storage.is_object_store(job.directory):
        remove_leftovers(job.directory, storage.listing(job.directory))
    return summary.manifest()


def _were_removed(ctx: StageContext) -> bool:
    """Whether these are a target's own signals, which the training that used them removes."""
    number = int(ctx.stage.removeprefix("signals-")) if ctx.stage != "signals" else None
    if number is None or ctx.recipe.target.keep_rounds:
        return False
    return ctx.run.manifest("target" if number == ctx.recipe.target.rounds else f"round-{number}") is not None


def repair(ctx: StageContext) -> dict[str, Any] | None:
    """Check the bytes of every shard of a finished stage. Returns the new summary if any had to be computed again."""
    job, manifest = make_job(ctx), ctx.run.manifest(ctx.stage)
    if manifest is None:
        raise UserError(f"--repair: {job.directory} has no manifest, so the stage is not done; run without --repair")
    if _were_removed(ctx):
        ctx.console.print(f"  {ctx.stage}: its shards were removed when they had been used (target.keep_rounds: false)")
        return None
    old, num_damaged = manifest["summary"], 0
    complete = dict(Sidecars(job).complete(storage.listing(job.directory)))
    paths = [storage.join(job.directory, name) for name in old["shards"]]
    problems = in_threads(
        lambda shard: damage(*shard), zip(paths, old["shard_bytes"], old["shard_sha256"], strict=True)
    )
    for shard, (name, problem) in enumerate(zip(old["shards"], problems, strict=True)):
        if not problem and shard not in complete:
            problem = "its sidecar is missing or describes other rows"
        if problem:
            ctx.console.print(f"  signals: {name} is damaged: {problem}", markup=False, soft_wrap=True)
            remove_shard(job.directory, shard)
            num_damaged += 1
    ctx.console.print(f"  signals: {len(old['shards'])} shards checked, {num_damaged} to compute again")
    return run(ctx) if num_damaged else None


def _compute(ctx: StageContext, job: SignalJob, shards: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields each shard with its sidecar once both are stored, in any order.

    Ray computes a shard again if its actor or node was lost; an actor does so once after any other error.
    """
    if not shards:
        return
    resources = ctx.recipe.resources
    actors, timeout_s = min(resources.signal_actors, len(shards)), resources.no_progress_timeout_s
    numbers = ray.data.from_items([{"shard": s} for s in shards], override_num_blocks=len(shards))
    data = numbers.map_batches(
        SignalActor,
        fn_constructor_kwargs={"job": job},
        batch_size=1,
        compute=ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors, max_tasks_in_flight_per_actor=2),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        resources=resources.custom_resources(ctx.stage),
    )
    # Ray ends a job that moves no block for half an hour. One shard of a slow model can take longer, and so can a new
    # node. The recipe decides instead, and meanwhile a line says what the job waits for.
    data.context.execution_no_progress_timeout_s = timeout_s or -1
    pool = describe_bundles([resources.worker_bundle(ctx.stage)] * actors)
    with WaitReporter(ctx.console, f"signals: waiting for a shard, of up to {pool},", len(shards)) as waiting:
        try:
            for row in data.iter_rows():
                waiting.progress()
                yield int(row["shard"]), json.loads(row["sidecar"])
        except ExecutionTimeoutError as error:
            raise UserError(
                f"signals: no shard was finished for {timeout_s:g} s, resources.no_progress_timeout_s; raise it, set "
                "it to null to wait for ever, or lower signals.shard_mb; the finished shards are kept"
            ) from error
