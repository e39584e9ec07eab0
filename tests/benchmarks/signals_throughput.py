"""The stage `signals` against the bare reference: masked tokens per second of one and of two processes.

Bare is the reference's forward pass and its head on the masked rows, over the stage's batches, collated beforehand. The
stage is pipelines.precompute on its own Ray: rows, noise, collation, forward pass, encoding, Parquet, sidecar. Both are
timed from the end of each process's first shard, which excludes start-up. One thread per process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from pipelines.recipe.resources import Resources
from pipelines.signals.actor import SignalActor
from pipelines.signals.plan import SignalJob, groups, plan_batches
from rcd_core.io import storage
from rcd_core.training.data.batches import collate
from rcd_core.training.data.examples import Chunks
from rcd_core.training.objective import masked_hidden
from rcd_core.training.settings import SignalRule
from tests.benchmarks.signals_data import Workload

ROOT = Path(__file__).resolve().parents[2]
HEAD_BYTES = 64 << 20  # logits of the bare head held at once, as in the encoding


def make_job(workload: Workload, rows_per_shard: int, num_shards: int, batch_tokens: int, top_k: int = 32) -> SignalJob:
    """Equal shards."""
    return SignalJob(
        directory="",
        reference=workload.reference,
        examples=workload.files,
        chunks=Chunks.of_files(workload.files),
        noise=workload.noise,
        block_length=workload.block_length,
        rule=SignalRule(top_k=top_k),
        row_offsets=tuple(rows_per_shard * s for s in range(num_shards + 1)),
        batch_tokens=batch_tokens,
        threads=1,
    )


class Rate(NamedTuple):
    """Masked tokens per second of all processes together, and processor seconds per million of them."""

    tokens_per_s: float
    cpu_s_per_million: float


def compare(job: SignalJob, repeats: int) -> dict[str, Any]:
    """Both with one and two processes, in turns, so that other load affects both. Ratios are stage / bare of the same
    turn; cpu_ratio uses the CPU time of one process, which excludes waiting."""
    rates: dict[str, list[Rate]] = {name: [] for name in ("bare_1", "stage_1", "bare_2", "stage_2")}
    for _ in range(repeats):
        for processes in (1, 2):
            rates[f"bare_{processes}"].append(bare(job, processes))
            rates[f"stage_{processes}"].append(stage(job, processes))

    def ratios(processes: int, field: int) -> dict[str, float]:
        pairs = zip(rates[f"stage_{processes}"], rates[f"bare_{processes}"], strict=True)
        values = [s[0] / b[0] if field == 0 else b[1] / s[1] for s, b in pairs]
        shown = {"median": median(values), "min": min(values), "max": max(values)}
        return {name: round(value, 3) for name, value in shown.items()} | {"repeats": repeats}

    return {
        "tokens_per_s": {name: round(median(r.tokens_per_s for r in values)) for name, values in rates.items()},
        "pipeline_vs_forward": ratios(1, 0),
        "two_actor_vs_bare_scaling": ratios(2, 0),
        "cpu_ratio": ratios(1, 1),
    }


# -- bare


def bare(job: SignalJob, processes: int) -> Rate:
    """Each process runs its share of the shards."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=_bare, args=(job, range(p, job.num_shards, processes), barrier, results))
        for p in range(processes)
    ]
    for worker in workers:
        worker.start()
    measurements = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    return _rate(measurements)


def _rate(measurements: Sequence[tuple[int, float, float]]) -> Rate:
    """(masked tokens, wall seconds, processor seconds) of each process."""
    tokens, cpu = sum(f[0] for f in measurements), sum(f[2] for f in measurements)
    return Rate(sum(n / wall for n, wall, _ in measurements), cpu / tokens * 1e6)


@torch.no_grad()
def _bare(job: SignalJob, shards: range, barrier: Any, results: Any) -> None:
    actor = SignalActor(job)
    model = actor.model
    batches = [_batches(actor, job.rows_of(shard)) for shard in shards]
    tile = max(1, HEAD_BYTES // (4 * model.vocab_size))

    def forward(batch: Any) -> int:
        hidden = masked_hidden(model, batch, None)
        for rows in torch.split(hidden, tile):
            model.head(rows)
        return len(hidden)

    barrier.wait()
    for batch in batches[0]:  # start-up, like the actors' first shards
        forward(batch)
    start, cpu = time.perf_counter(), time.process_time()
    tokens = sum(forward(batch) for shard in batches[1:] for batch in shard)
    results.put((tokens, time.perf_counter() - start, time.process_time() - cpu))


def _batches(actor: SignalActor, rows: range) -> list[Any]:
    """A shard's batches as the actor makes them, collated."""
    job, model, batches = actor.job, actor.model, []
    for rows_of_group in groups((actor.source.row(g) for g in rows), job.batch_tokens):
        for places in plan_batches([len(r.input_ids) for r in rows_of_group], job.batch_tokens):
            batch, _ = collate(
                [rows_of_group[i] for i in places],
                mask_token_id=model.mask_token_id,
                pad_token_id=model.info.pad_token_id,
                block_length=job.block_length,
            )
            batches.append(batch)
    return batches


# -- the stage


class TimedActor(SignalActor):
    """The stage's actor, which also records wall and CPU time at the end of each shard."""

    def compute(self, shard: int) -> dict[str, Any]:
        sidecar = super().compute(shard)
        with open(f"{self.job.directory}/times-{os.getpid()}", "a") as file:
            file.write(json.dumps([shard, time.time(), time.process_time()]) + "\n")
        return sidecar


def stage(job: SignalJob, actors: int, keep: Path | None = None) -> Rate:
    """The stage's own Ray Data job; an actor's first shard is start-up. keep: where to copy the shards."""
    from rich.console import Console

    from pipelines import precompute

    directory = Path(tempfile.mkdtemp(prefix="rcd-signals-"))
    job = replace(job, directory=str(directory))
    context: Any = SimpleNamespace(
        recipe=SimpleNamespace(resources=Resources(signal_actors=actors)), console=Console(quiet=True)
    )
    try:
        with mock.patch.object(precompute, "SignalActor", TimedActor):
            for _ in precompute._compute(context, job, list(range(job.num_shards))):
                pass
        measurements = []
        for path in directory.glob("times-*"):
            (_, started, cpu), *rest = [json.loads(line) for line in path.read_text().splitlines()]
            if rest:
                sidecars = [f"{directory}/shard-{shard:05d}.parquet.json" for shard, _, _ in rest]
                tokens = sum(storage.read_json(sidecar)["masked_tokens"] for sidecar in sidecars)
                measurements.append((tokens, rest[-1][1] - started, rest[-1][2] - cpu))
        if keep is not None:
            shutil.copytree(directory, keep, dirs_exist_ok=True)
        return _rate(measurements)
    finally:
        shutil.rmtree(directory)


@contextmanager
def own_ray(num_cpus: int = 2) -> Iterator[None]:
    """A private Ray on this machine."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.pop("RAY_ADDRESS", None)
    import ray
    from ray.data import DataContext

    temp_dir = tempfile.mkdtemp(prefix="rcd-b-", dir="/tmp")
    ray.init(
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=200 * 1024**2,
        _temp_dir=temp_dir,
        log_to_driver=False,
    )
    DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(temp_dir, ignore_errors=True)
