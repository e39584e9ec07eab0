"""signals: the frozen reference's predictions for every masked token of the training rows, in sharded Parquet.

    python pipelines/precompute.py --recipe demo

A shard is a fixed list of rows in training order, planned before anything is computed and cut into fixed batches, so
the numbers do not depend on how many actors there are. Ray Data maps a pool of reference actors over the shard
descriptors. A shard is written whole, renamed, then gets its sidecar; what has a valid sidecar is not computed again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from pipelines.run import StageContext
from rcd_core import storage
from rcd_core.calibrate import entropy_histogram
from rcd_core.noise import NoiseSettings

SCHEMA_VERSION = 1
ROWS_PER_GROUP = 128


@dataclass(frozen=True, kw_only=True)
class SignalJob:
    """What an actor needs to compute any shard."""

    directory: str
    reference: str
    examples: tuple[str, ...]
    noise: NoiseSettings
    block_length: int
    top_k: int
    alpha_temperature: float
    delta_temperature: float
    num_rows: int
    rows_per_shard: int
    batch_rows: int
    threads: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    def shard_name(self, shard: int) -> str:
        return f"shard-{shard:05d}.parquet"

    def sidecar(self, shard: int) -> str:
        return storage.join(self.directory, self.shard_name(shard) + ".json")


def run(ctx: StageContext) -> dict[str, Any]:
    """Compute the missing shards. Summary: what the rows are and how to read them; the trainer checks it."""
    job = make_job(ctx)
    sidecars = {shard: found for shard in range(job.num_shards) if (found := _valid_sidecar(job, shard))}
    todo = [shard for shard in range(job.num_shards) if shard not in sidecars]
    if sidecars:
        ctx.console.print(f"  signals: {len(sidecars)} of {job.num_shards} shards are already there")
    for done, (shard, sidecar) in enumerate(_compute(ctx, job, todo), start=1):
        sidecars[shard] = sidecar
        if done % max(1, len(todo) // 10) == 0:
            ctx.console.print(f"  signals: {len(sidecars)} of {job.num_shards} shards")
    ordered = [sidecars[shard] for shard in range(job.num_shards)]
    prepare = ctx.input("prepare")["summary"]
    histogram = np.sum([s["entropy_histogram"] for s in ordered], axis=0, dtype=np.int64)
    return {
        "schema_version": SCHEMA_VERSION,
        "shards": [job.shard_name(shard) for shard in range(job.num_shards)],
        "rows": job.num_rows,
        "rows_per_shard": job.rows_per_shard,
        "masked_tokens": sum(s["masked_tokens"] for s in ordered),
        "bytes": sum(s["bytes"] for s in ordered),
        "top_k": job.top_k,
        "alpha_temperature": job.alpha_temperature,
        "delta_temperature": job.delta_temperature,
        "family": ordered[0]["family"],
        "vocab_size": ordered[0]["vocab_size"],
        "mask_token_id": prepare["mask_token_id"],
        "tokenizer_sha256": prepare["tokenizer_sha256"],
        "block_length": job.block_length,
        "noise": {"seed": job.noise.seed, "draws": job.noise.draws, "eps": job.noise.eps},
        "entropy_histogram": histogram.tolist(),
        "fingerprint": [s["sha256"] for s in ordered],
    }


def make_job(ctx: StageContext) -> SignalJob:
    """The plan: a pure function of the recipe and the examples' manifest."""
    recipe = ctx.recipe
    prepare = ctx.input("prepare")["summary"]
    # As many rows as the targets train on, but never the same (example, draw) twice.
    steps = [recipe.training(s).train for s in ("target", *(f"target-{name}" for name in recipe.variants))]
    wanted = max(t.steps * t.batch_size for t in steps)
    num_examples = prepare["counts"]["train"]["examples"]
    return SignalJob(
        directory=ctx.directory,
        reference=ctx.checkpoint("reference"),
        examples=tuple(storage.join(ctx.input_dir("prepare"), "train", name) for name in prepare["train"]),
        noise=recipe.noise,
        block_length=recipe.block_length,
        top_k=recipe.signals.top_k,
        alpha_temperature=recipe.signals.alpha_temperature,
        delta_temperature=recipe.signals.delta_temperature,
        num_rows=min(wanted, num_examples * recipe.noise.draws),
        rows_per_shard=recipe.signals.rows_per_shard,
        batch_rows=recipe.signals.batch_rows,
        threads=max(1, int(recipe.resources.cpus_per_worker)),
    )


def _valid_sidecar(job: SignalJob, shard: int) -> dict[str, Any] | None:
    """The sidecar of a shard that is whole, by its size; None when it must be computed."""
    try:
        sidecar: dict[str, Any] = storage.read_json(job.sidecar(shard))
        whole = storage.size(storage.join(job.directory, job.shard_name(shard))) == sidecar["bytes"]
    except FileNotFoundError:
        return None
    return sidecar if whole else None


def _compute(ctx: StageContext, job: SignalJob, shards: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    if not shards:
        return
    import ray.data
    from ray.data import ActorPoolStrategy

    resources = ctx.recipe.resources
    found = ray.data.from_items([{"shard": s} for s in shards], override_num_blocks=len(shards)).map_batches(
        SignalActor,
        fn_constructor_kwargs={"job": job},
        batch_size=1,
        compute=ActorPoolStrategy(size=min(resources.signal_actors, len(shards))),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
    )
    for row in found.iter_rows():
        yield int(row["shard"]), storage.read_json(job.sidecar(int(row["shard"])))


class SignalActor:
    """Holds the reference and computes one shard per call."""

    def __init__(self, job: SignalJob) -> None:
        import torch

        from rcd_core.families.loading import load_model
        from rcd_core.training.rows import ExampleSource

        self.job = job
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            torch.set_num_threads(job.threads)
        self.model = load_model(job.reference, device=device, dtype=torch.bfloat16 if device == "cuda" else None)
        self.source = ExampleSource(job.examples, job.noise)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for shard in batch["shard"]:
            self._shard(int(shard))
        return batch

    def _shard(self, shard: int) -> None:
        import hashlib
        import io

        import pyarrow.parquet as pq

        job = self.job
        last = min((shard + 1) * job.rows_per_shard, job.num_rows)
        starts = range(shard * job.rows_per_shard, last, job.batch_rows)
        tables = [self._batch(range(first, min(first + job.batch_rows, last))) for first in starts]
        import pyarrow as pa

        table = pa.concat_tables(tables)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", row_group_size=ROWS_PER_GROUP)
        data = buffer.getvalue()
        storage.write_bytes(storage.join(job.directory, job.shard_name(shard)), data)
        entropies = table["entropy"].combine_chunks().values.to_numpy(zero_copy_only=False)
        sidecar = {
            "rows": table.num_rows,
            "masked_tokens": len(entropies),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "family": self.model.family,
            "vocab_size": self.model.vocab_size,
            "entropy_histogram": entropy_histogram(entropies).tolist(),
        }
        storage.write_json(job.sidecar(shard), sidecar)

    def _batch(self, indices: range) -> Any:
        """One forward of the reference; the rows with their signals as an Arrow table."""
        import pyarrow as pa

        from rcd_core.training.loop import reference_signals
        from rcd_core.training.rows import collate

        job, model = self.job, self.model
        rows = [self.source.row(g) for g in indices]
        batch, _ = collate(
            rows,
            mask_token_id=model.mask_token_id,
            pad_token_id=model.info.pad_token_id,
            block_length=job.block_length,
        )
        signals = reference_signals(
            model,
            batch.to(model.device),
            job.top_k,
            alpha_temperature=job.alpha_temperature,
            delta_temperature=job.delta_temperature,
        ).to("cpu")
        lengths = np.array([len(r.input_ids) for r in rows])
        counts = np.array([int(r.masked.sum()) for r in rows])

        def lists(values: Any, sizes: Any, dtype: pa.DataType) -> pa.ListArray:
            return pa.ListArray.from_arrays(pa.array(np.r_[0, np.cumsum(sizes)], pa.int32()), pa.array(values, dtype))

        kept = signals.topk_ids.shape[1]
        return pa.table(
            {
                "example_id": pa.array([r.example_id for r in rows], pa.string()),
                "draw": pa.array([r.draw for r in rows], pa.int32()),
                "p_mask": pa.array([r.p for r in rows], pa.float32()),
                "input_ids": lists(np.concatenate([r.input_ids for r in rows]), lengths, pa.int32()),
                "labels": lists(np.concatenate([r.labels for r in rows]), lengths, pa.int32()),
                "masked_positions": lists(np.concatenate([np.flatnonzero(r.masked) for r in rows]), counts, pa.int32()),
                "topk_ids": lists(signals.topk_ids.numpy().ravel(), counts * kept, pa.int32()),
                "topk_logprobs": lists(signals.topk_logprobs.numpy().ravel(), counts * kept, pa.float16()),
                "entropy": lists(signals.entropy.numpy(), counts, pa.float32()),
                "tail_mass": lists(signals.tail_mass.numpy(), counts, pa.float32()),
            }
        )


if __name__ == "__main__":
    from pipelines.driver import stage_main

    stage_main("signals")
