"""signals: the frozen reference's predictions for every masked token of the training rows, in sharded Parquet.

    python pipelines/precompute.py --recipe demo
    python pipelines/precompute.py --recipe demo --repair     # check every shard's bytes, compute damaged ones again

Planned before anything is computed (signal_plan.py): a shard is a fixed list of rows in training order, cut into fixed
batches, so the numbers do not depend on how many actors there are. Ray Data maps a pool of reference actors
(signal_actor.py) over the shards' numbers; the rows go from an actor straight to storage (signal_files.py). What has a
valid sidecar is not computed again.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from pipelines.ray_cluster.resources import describe_bundles
from pipelines.ray_cluster.waiting import Waiting
from pipelines.run.directory import StageContext
from pipelines.signals import files as signal_files
from pipelines.signals.actor import SignalActor, SignalJob
from pipelines.signals.plan import plan_shards
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.training.data.examples import Chunks
from rcd_core.training.data.signal_cache import damage, noise_record
from rcd_core.training.data.signal_format import SCHEMA_VERSION


def run(ctx: StageContext) -> dict[str, Any]:
    """Compute the missing shards. Summary: what the rows are and how to read them; the trainer checks it."""
    job = make_job(ctx)
    signal_files.remove_leftovers(job.directory)
    found = Found(ctx, job)
    todo = [shard for shard in range(job.num_shards) if not found.add(shard)]
    if len(todo) < job.num_shards:
        ctx.console.print(f"  signals: {job.num_shards - len(todo)} of {job.num_shards} shards are already there")
    for done, shard in enumerate(_compute(ctx, job, todo), start=1):
        if not found.add(shard):
            raise UserError(f"{signal_files.sidecar_path(job.directory, shard)} does not describe its shard; run again")
        if done % max(1, len(todo) // 10) == 0:
            ctx.console.print(f"  signals: {job.num_shards - len(todo) + done} of {job.num_shards} shards")
    signal_files.remove_leftovers(job.directory)
    return found.summary()


def repair(ctx: StageContext) -> dict[str, Any] | None:
    """Check the bytes of every shard of a finished stage; the new summary where some had to be computed again."""
    job, manifest = make_job(ctx), ctx.run.manifest(ctx.stage)
    if manifest is None:
        raise UserError(f"--repair mends finished signals, but {job.directory} has no manifest; run without --repair")
    old = manifest["summary"]
    damaged = []
    for shard, name in enumerate(old["shards"]):
        path = storage.join(job.directory, name)
        problem = damage(path, old["shard_bytes"][shard], old["shard_sha256"][shard])
        if not problem and not job.valid_sidecar(shard):
            problem = "its sidecar is missing or describes other rows"
        if problem:
            ctx.console.print(f"  signals: {name} is damaged: {problem}", markup=False, soft_wrap=True)
            signal_files.forget(job.directory, shard)
            damaged.append(name)
    ctx.console.print(f"  signals: {len(old['shards'])} shards checked, {len(damaged)} to compute again")
    return run(ctx) if damaged else None


def make_job(ctx: StageContext) -> SignalJob:
    """The plan: a pure function of the recipe and the examples' manifest."""
    recipe, prepare = ctx.recipe, ctx.input("prepare")["summary"]
    return SignalJob(
        directory=ctx.directory,
        reference=ctx.checkpoint("reference"),
        examples=tuple(storage.join(ctx.input_dir("prepare"), "train", name) for name in prepare["train"]),
        chunks=Chunks.from_manifest(prepare["chunks"]),
        noise=recipe.noise,
        block_length=recipe.block_length,
        rule=recipe.signals.rule,
        row_offsets=tuple(plan_shards(recipe, prepare)),
        batch_tokens=recipe.signals.batch_tokens,
        threads=max(1, int(recipe.resources.cpus_per_worker)),
    )


def _compute(ctx: StageContext, job: SignalJob, shards: list[int]) -> Iterator[int]:
    """Yields each shard when it is on storage, in whatever order they are done.

    Ray computes a shard again whose actor or node was lost; an error in the code ends the job at once.
    """
    if not shards:
        return
    import ray.data
    from ray.data import ActorPoolStrategy
    from ray.data.exceptions import ExecutionTimeoutError

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
        resources=resources.custom_resources("signals"),
    )
    # Ray ends a job that moves no block for half an hour, which one shard of a slow model, or a node on its way, can
    # take. Ours to decide: the recipe says when to give up, and until then the waiting is announced.
    data.context.execution_no_progress_timeout_s = timeout_s or -1
    pool = describe_bundles([resources.worker_bundle("signals")] * actors)
    with Waiting(ctx.console, f"signals: waiting for a shard, of up to {pool},", len(shards)) as waiting:
        try:
            for row in data.iter_rows():
                waiting.progress()
                yield int(row["shard"])
        except ExecutionTimeoutError as error:
            raise UserError(
                f"signals: no shard was finished for {timeout_s:g} s, resources.no_progress_timeout_s; raise it, set "
                "it to null to wait for ever, or lower signals.shard_mb; the finished shards are kept"
            ) from error


class Found:
    """What the sidecars say together; of each only a few numbers are kept."""

    def __init__(self, ctx: StageContext, job: SignalJob) -> None:
        self.ctx, self.job = ctx, job
        self.shards: dict[int, dict[str, Any]] = {}
        self.histogram = np.zeros(0, dtype=np.int64)
        self.reasons: Counter[str] = Counter()

    def add(self, shard: int) -> bool:
        """Take note of a shard; False where it has no valid sidecar. UserError once too many rows are bad."""
        sidecar = self.job.valid_sidecar(shard)
        if sidecar is None:
            return False
        histogram = np.asarray(sidecar.pop("entropy_histogram"), dtype=np.int64)
        self.histogram = self.histogram + histogram if len(self.histogram) else histogram
        bad = sidecar.pop("bad_rows")
        self.shards[shard] = sidecar | {"num_bad": len(bad)}
        self.reasons.update(row["reason"] for row in bad)
        limit = self.ctx.recipe.signals.max_bad_rows
        if sum(self.reasons.values()) > limit * self.job.num_rows:
            path = self._side_table()
            raise UserError(
                f"signals: {sum(self.reasons.values())} of {self.job.num_rows} rows cannot be used, more than "
                f"signals.max_bad_rows ({limit:g}) allows: {self._counted()}; they are listed in {path}: mend the "
                "examples, or raise signals.max_bad_rows to go on without them"
            )
        return True

    def summary(self) -> dict[str, Any]:
        """The manifest of the stage: everything that must agree with whoever trains on it."""
        job, recipe, prepare = self.job, self.ctx.recipe, self.ctx.input("prepare")["summary"]
        path = self._side_table()
        if self.reasons:
            self.ctx.console.print(f"  signals: bad rows: {self._counted()}; listed in {path}", soft_wrap=True)
        ordered = [self.shards[shard] for shard in range(job.num_shards)]
        return {
            "schema_version": SCHEMA_VERSION,
            "shards": [signal_files.shard_name(shard) for shard in range(job.num_shards)],
            "row_offsets": list(job.row_offsets),
            "shard_bytes": [s["bytes"] for s in ordered],
            "shard_sha256": [s["sha256"] for s in ordered],
            "rows": job.num_rows,
            **{n: sum(s[n] for s in ordered) for n in ("tokens", "masked_tokens", "kept_entries", "bytes")},
            "bad_rows": dict(sorted(self.reasons.items())),
            **{n: self._common(n) for n in ("family", "vocab_size", "mask_token_id", "reference", "compute_dtype")},
            "reference_checkpoint": job.reference,
            "block_length": job.block_length,
            "pad_multiple": recipe.data.pad_multiple or recipe.block_length,
            "tokenizer_sha256": prepare["tokenizer_sha256"],
            "noise": noise_record(job.noise),
            **vars(job.rule),
            "dtypes": {"topk_ids": "int32", "topk_logprobs": "float16", "entropy": "float32", "tail_mass": "float32"},
            "entropy_histogram": self.histogram.tolist(),
            "fingerprint": [s["sha256"] for s in ordered],
        }

    def _common(self, name: str) -> Any:
        """A fact on which all shards must agree: a hub checkpoint may have moved on between two runs."""
        first = self.shards[0][name]
        for shard, sidecar in self.shards.items():
            if sidecar[name] != first:
                raise UserError(
                    f"signals: {signal_files.shard_name(0)} was made with {name} {first!r}, "
                    f"{signal_files.shard_name(shard)} with {sidecar[name]!r}; run full.py --redo signals"
                )
        return first

    def _counted(self) -> str:
        return ", ".join(f"{n} x {reason}" for reason, n in sorted(self.reasons.items()))

    def _side_table(self) -> str:
        """Written again from the sidecars, so that it names each row once whatever was interrupted."""
        found = (s for s, kept in sorted(self.shards.items()) if kept["num_bad"])
        sidecars = ((s, storage.read_json(signal_files.sidecar_path(self.job.directory, s))) for s in found)
        return signal_files.write_bad_rows(self.job.directory, sidecars)


if __name__ == "__main__":
    from pipelines.run.driver import stage_main

    stage_main("signals")
