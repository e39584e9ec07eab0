"""The work of the stage `signals`: an actor that holds the reference and computes one shard per call."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.ray_cluster.hardware import worker_device
from pipelines.signals import files as signal_files
from pipelines.signals.plan import groups, plan_batches
from rcd_core.calibration.distance import entropy_histogram
from rcd_core.io import storage
from rcd_core.noise import NoiseSettings
from rcd_core.training.data.examples import Chunks
from rcd_core.training.settings import SignalRule

_BAD = ("example_id", "draw", "reason")


@dataclass(frozen=True, kw_only=True)
class SignalJob:
    """What an actor needs to compute any shard. row_offsets: [0, ..., rows], where the shards begin."""

    directory: str
    reference: str
    examples: tuple[str, ...]
    chunks: Chunks
    noise: NoiseSettings
    block_length: int
    rule: SignalRule
    row_offsets: tuple[int, ...]
    batch_tokens: int
    threads: int

    @property
    def num_shards(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def num_rows(self) -> int:
        return self.row_offsets[-1]

    @property
    def adaptive(self) -> bool:
        return self.rule.keep_mass is not None

    def rows_of(self, shard: int) -> range:
        return range(self.row_offsets[shard], self.row_offsets[shard + 1])

    def valid_sidecar(self, shard: int) -> dict[str, Any] | None:
        rows = self.rows_of(shard)
        return signal_files.valid_sidecar(self.directory, shard, rows.start, len(rows))


class SignalActor:
    """Holds the reference, two chunks of examples and one group of rows: memory does not grow with the data."""

    def __init__(self, job: SignalJob) -> None:
        from rcd_core.families.loading import checkpoint_directory, load_model
        from rcd_core.training.data.examples import ExampleSource, Limits

        self.job = job
        device, dtype = worker_device(job.threads)
        self.model = load_model(job.reference, device=device, dtype=dtype)
        limits = Limits(self.model.vocab_size, self.model.max_positions)
        self.source = ExampleSource(job.examples, job.noise, job.chunks, limits)
        self.facts = {
            "family": self.model.family,
            "vocab_size": self.model.vocab_size,
            "mask_token_id": self.model.mask_token_id,
            "compute_dtype": str(self.model.dtype).removeprefix("torch."),
            "reference": _identity(checkpoint_directory(job.reference)),
        }

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """{"shard": numbers} -> the same: only these pass through the object store, rows go straight to storage."""
        for shard in batch["shard"]:
            self.compute(int(shard))
        return batch

    def compute(self, shard: int) -> None:
        """Write one shard and its sidecar."""
        job = self.job
        rows = job.rows_of(shard)
        seen: Counter[str] = Counter()
        histogram = np.zeros(0, dtype=np.int64)
        bad: list[dict[str, Any]] = []
        with signal_files.shard_writer(job.directory, shard, job.adaptive) as writer:
            for held, table in self.tables(rows):
                writer.write(table)
                entropies = table["entropy"].combine_chunks().values.to_numpy(zero_copy_only=False)
                found = entropy_histogram(entropies)
                histogram = found if not len(histogram) else histogram + found
                kept = len(table["topk_ids"].combine_chunks().values)
                tokens = sum(len(r.input_ids) for r in held)
                seen.update(masked_tokens=len(entropies), tokens=tokens, kept_entries=kept)
                bad += [{name: getattr(r, name) for name in _BAD} | {"row": r.index} for r in held if r.reason]
            content = writer.close()
        content |= {"first_row": rows.start, **seen, **self.facts, "bad_rows": bad}
        content["entropy_histogram"] = histogram.tolist()
        signal_files.write_sidecar(job.directory, shard, content)

    def tables(self, rows: range) -> Iterator[tuple[list[Any], Any]]:
        """(rows, their Arrow table) group by group, in row order."""
        for held in groups((self.source.row(g) for g in rows), self.job.batch_tokens):
            yield held, self._group(held)

    def _group(self, held: Sequence[Any]) -> Any:
        """Batches of similar lengths, computed one by one and put back into row order."""
        import pyarrow as pa

        from rcd_core.signals import ReferenceSignals
        from rcd_core.training.data.signal_format import encode

        good = [i for i, row in enumerate(held) if not row.reason]
        found = plan_batches([len(held[i].input_ids) for i in good], self.job.batch_tokens)
        batches = [[good[j] for j in batch] for batch in found]
        tables = [self.batch([held[i] for i in batch]) for batch in batches]
        if len(good) < len(held):
            rest = [i for i, row in enumerate(held) if row.reason]
            batches.append(rest)
            nothing = ReferenceSignals.empty(self.job.rule.top_k)
            tables.append(encode([held[i] for i in rest], nothing, self.job.adaptive))
        places = np.argsort(np.concatenate(batches))
        return pa.concat_tables(tables).combine_chunks().take(pa.array(places))

    def batch(self, rows: Sequence[Any]) -> Any:
        """One forward pass of the reference; the rows with their signals as an Arrow table."""
        from rcd_core.training.data.batches import collate
        from rcd_core.training.data.signal_format import encode
        from rcd_core.training.objective import reference_signals

        model = self.model
        batch, _ = collate(
            rows,
            mask_token_id=model.mask_token_id,
            pad_token_id=model.info.pad_token_id,
            block_length=self.job.block_length,
        )
        signals = reference_signals(model, batch.to(model.device), **vars(self.job.rule))
        return encode(rows, signals.to("cpu"), self.job.adaptive)


def _identity(directory: Any) -> dict[str, Any]:
    """What the reference's weights hash to, and the revision where they are a hub snapshot."""
    digests = [storage.sha256(str(file)) for file in sorted(directory.glob("*.safetensors"))]
    joined = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return {"weights_sha256": joined, "revision": directory.name if directory.parent.name == "snapshots" else None}
