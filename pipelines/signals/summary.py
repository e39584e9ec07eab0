"""The summary of the stage `signals`, collected from the sidecars of its shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.run.directory import StageContext
from pipelines.signals import files
from pipelines.signals.plan import SignalJob
from rcd_core.errors import UserError
from rcd_core.training.data.signal_cache import noise_record
from rcd_core.training.data.signal_format import SCHEMA_VERSION

# Facts that must be the same in all shards. A checkpoint on the hub may change between two jobs.
_COMMON = ("family", "vocab_size", "mask_token_id", "reference", "compute_dtype")
_SUMS = ("tokens", "masked_tokens", "kept_entries", "bytes")


class SignalSummary:
    """Sums up the shards added so far. Keeps a few numbers of each, and its bad rows."""

    def __init__(self, ctx: StageContext, job: SignalJob) -> None:
        self.ctx, self.job = ctx, job
        self.shards: dict[int, dict[str, Any]] = {}
        self.histogram: Any = 0  # of entropies
        self.bad_rows: Counter[str] = Counter()  # reason -> rows
        self.listed: dict[int, pa.Table] = {}  # the bad rows by shard

    def add(self, shard: int, sidecar: Mapping[str, Any]) -> None:
        """Add a finished shard. Raises UserError once more rows are bad than signals.max_bad_rows allows."""
        self.histogram = self.histogram + np.asarray(sidecar["entropy_histogram"], dtype=np.int64)
        self.shards[shard] = {name: sidecar[name] for name in ("sha256", *_SUMS, *_COMMON)}
        if bad := sidecar["bad_rows"]:
            self.listed[shard] = files.bad_rows(shard, sidecar)
        self.bad_rows.update(row["reason"] for row in bad)
        limit = self.ctx.recipe.signals.max_bad_rows
        if self.bad_rows.total() > limit * self.job.num_rows:
            path = self._write_bad_rows()
            raise UserError(
                f"signals: {self.bad_rows.total()} of {self.job.num_rows} rows cannot be used, more than "
                f"signals.max_bad_rows ({limit:g}) allows: {self._reasons()}; they are listed in {path}: fix the "
                "examples, or raise signals.max_bad_rows to continue without them"
            )

    def manifest(self) -> dict[str, Any]:
        """The stage's summary: all that a training checks before it uses the signals."""
        job, recipe, prepare = self.job, self.ctx.recipe, self.ctx.input("prepare")["summary"]
        path = self._write_bad_rows()
        if self.bad_rows:
            self.ctx.console.print(f"  signals: bad rows: {self._reasons()}; listed in {path}", soft_wrap=True)
        shards = [self.shards[shard] for shard in range(job.num_shards)]
        return {
            "schema_version": SCHEMA_VERSION,
            "shards": [files.shard_name(shard) for shard in range(job.num_shards)],
            "row_offsets": list(job.row_offsets),
            "shard_bytes": [s["bytes"] for s in shards],
            "shard_sha256": [s["sha256"] for s in shards],
            "rows": job.num_rows,
            **{name: sum(s[name] for s in shards) for name in _SUMS},
            "bad_rows": dict(sorted(self.bad_rows.items())),
            **{name: self._common(name) for name in _COMMON},
            "reference_checkpoint": job.reference,
            **({"first_row": job.first_row, "own": True} if job.own and job.own.feeds_back else {}),
            **({"on_policy": job.on_policy} if job.on_policy else {}),
            "block_length": job.block_length,
            "pad_multiple": recipe.data.pad_multiple or recipe.block_length,
            "tokenizer_sha256": prepare["tokenizer_sha256"],
            "noise": noise_record(job.noise),
            **vars(job.rule),
            "dtypes": {"topk_ids": "int32", "topk_logprobs": "float16", "entropy": "float32", "tail_mass": "float32"},
            "entropy_histogram": self.histogram.tolist(),
            "fingerprint": [s["sha256"] for s in shards],
        }

    def _common(self, name: str) -> Any:
        first = self.shards[0][name]
        for shard, sidecar in self.shards.items():
            if sidecar[name] != first:
                raise UserError(
                    f"signals: {files.shard_name(0)} was made with {name} {first!r}, "
                    f"{files.shard_name(shard)} with {sidecar[name]!r}; run full.py --redo signals"
                )
        return first

    def _reasons(self) -> str:
        return ", ".join(f"{count} x {reason}" for reason, count in sorted(self.bad_rows.items()))

    def _write_bad_rows(self) -> str:
        """Writes the whole table again, so that an interrupted job cannot list a row twice."""
        return files.write_bad_rows(self.job.directory, [table for _, table in sorted(self.listed.items())])
