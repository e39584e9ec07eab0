"""The worker of the stage `signals`: an actor that holds the reference and computes one shard per call."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.ray_cluster.hardware import device_of
from pipelines.run.once_more import once_more
from pipelines.signals import files
from pipelines.signals.plan import SignalJob, groups, plan_batches
from rcd_core.calibration.entropy_histogram import entropy_histogram
from rcd_core.families.loading import checkpoint_directory, load_model
from rcd_core.io import checksums, storage
from rcd_core.io.retries import be_patient
from rcd_core.signals import ReferenceSignals
from rcd_core.training.data.batches import collate
from rcd_core.training.data.examples import ExampleSource, Limits
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.data.signal_format import encode
from rcd_core.training.objective import reference_signals
from rcd_core.training.own_signals import OwnSignals


class SignalActor:
    """Holds the reference, two chunks of examples and one group of rows: memory does not grow with the data."""

    def __init__(self, job: SignalJob) -> None:
        be_patient()
        job.process.apply()
        self.job = job
        device, dtype = device_of(job.gpus, job.threads)
        self.model = load_model(job.reference, device=device, dtype=dtype)
        limits = Limits(self.model.vocab_size, self.model.max_positions)
        self.source = ExampleSource(job.examples, job.noise, job.chunks, limits)
        self.model_facts = {
            "family": self.model.family,
            "vocab_size": self.model.vocab_size,
            "mask_token_id": self.model.mask_token_id,
            "compute_dtype": str(self.model.dtype).removeprefix("torch."),
            "reference": _identity(checkpoint_directory(job.reference)),
        }
        self.own = None
        if job.own is not None:
            settings = (job.own, job.rule, job.noise, job.block_length, job.seed, job.on_policy)
            self.own = OwnSignals(self.model, *settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """{"shard": numbers} -> the same with their sidecars as JSON. Rows go straight to storage."""
        sidecars = [json.dumps(once_more(self.compute)(int(shard))) for shard in batch["shard"]]
        return {**batch, "sidecar": np.array(sidecars, dtype=object)}

    def compute(self, shard: int) -> dict[str, Any]:
        """Write one shard and its sidecar. Returns the sidecar."""
        job = self.job
        counts: Counter[str] = Counter()
        histogram: Any = 0
        bad: list[dict[str, Any]] = []
        with files.shard_writer(job.directory, shard, job.adaptive) as writer:
            for rows, table in self.tables(job.rows_of(shard)):
                writer.write(table)
                entropies = table["entropy"].combine_chunks().values.to_numpy(zero_copy_only=False)
                histogram += entropy_histogram(entropies)
                kept = len(table["topk_ids"].combine_chunks().values)
                tokens = sum(len(row.input_ids) for row in rows)
                counts.update(masked_tokens=len(entropies), tokens=tokens, kept_entries=kept)
                bad += [
                    {"example_id": row.example_id, "draw": row.draw, "reason": row.reason, "row": row.index}
                    for row in rows
                    if row.reason
                ]
            sidecar = writer.close()
        sidecar |= {"first_row": job.rows_of(shard).start, **counts, **self.model_facts, "bad_rows": bad}
        sidecar["entropy_histogram"] = histogram.tolist()
        return files.write_sidecar(job.directory, shard, sidecar)

    def tables(self, rows: range) -> Iterator[tuple[list[TrainingRow], pa.Table]]:
        """(rows, their Arrow table) group by group, in row order."""
        first = self.job.first_row
        for group in groups((self.source.row(first + g) for g in rows), self.job.batch_tokens):
            yield group, self._table(group)

    def _table(self, group: Sequence[TrainingRow]) -> pa.Table:
        """Computes batches of similar lengths one by one, and puts their rows back into row order."""
        good = [i for i, row in enumerate(group) if not row.reason]
        lengths = [len(group[i].input_ids) for i in good]
        batches = [[good[j] for j in batch] for batch in plan_batches(lengths, self.job.batch_tokens)]
        tables = [self.batch([group[i] for i in batch]) for batch in batches]
        if bad := [i for i, row in enumerate(group) if row.reason]:
            batches.append(bad)
            no_signals = ReferenceSignals.empty(self.job.rule.top_k)
            tables.append(encode([group[i] for i in bad], no_signals, self.job.adaptive))
        return pa.concat_tables(tables).combine_chunks().take(pa.array(np.argsort(np.concatenate(batches))))

    def batch(self, rows: Sequence[TrainingRow]) -> pa.Table:
        """One forward pass of the reference, or some of the target; the rows with their signals as an Arrow table."""
        model = self.model
        if self.own is not None:
            rows, own = self.own(rows)
            return encode(rows, own.to("cpu"), self.job.adaptive)
        batch, _ = collate(
            rows,
            mask_token_id=model.mask_token_id,
            pad_token_id=model.info.pad_token_id,
            block_length=self.job.block_length,
            noise=self.job.noise,
        )
        signals = reference_signals(model, batch.to(model.device), self.job.rule)
        return encode(rows, signals.to("cpu"), self.job.adaptive)


def _identity(directory: Path) -> dict[str, Any]:
    """The hash of the reference's weights, and the revision of a hub snapshot."""
    digests = [storage.sha256(str(file)) for file in sorted(directory.glob("*.safetensors"))]
    revision = directory.name if directory.parent.name == "snapshots" else None
    return {"weights_sha256": checksums.joined(digests), "revision": revision}
