"""The reference-signal cache as a source of training rows.

Shards are Parquet files of consecutive rows; the manifest says at which row each begins and what its bytes hash to.
A reader checks a shard's bytes when it first opens it, and holds two row groups: its memory does not grow with the
cache. Every worker reads all row groups and takes its own rows out of them; each worker's reading is sequential.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.noise import NoiseSettings
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.data.signal_format import SCHEMA_VERSION, SignalGroup

_SHARED = "reference and target must share it: name another reference.start, then run full.py --redo signals"
REMEDIES = {
    "schema_version": "they were made by another version of this program: run full.py --redo signals",
    "family": _SHARED,
    "vocab_size": _SHARED,
    "mask_token_id": _SHARED,
}


def require_match(manifest: Mapping[str, Any], wanted: Mapping[str, Any], whose: str) -> None:
    """Raises UserError where the signals were made for something else: field, both values, remedy."""
    for name, value in wanted.items():
        found = manifest.get(name)
        if found != value:
            remedy = REMEDIES.get(name, "restore that setting, or run full.py --redo signals")
            raise UserError(f"the signals' {name} is {found!r} but {whose} is {value!r}; {remedy}")


def noise_record(noise: NoiseSettings) -> dict[str, Any]:
    """Everything that decides the masks, as the manifest has it."""
    unit = "example" if noise.block_length is None else f"block of {noise.block_length} tokens"
    schedule = f"p = (1 - eps) t + eps, t uniform in [0, 1) per {unit}"
    return {"seed": noise.seed, "draws": noise.draws, "eps": noise.eps, "schedule": schedule}


class SignalSource:
    """manifest: the summary of the stage `signals`; row g is the cache's row g mod its number of rows."""

    def __init__(self, directory: str, manifest: Mapping[str, Any]) -> None:
        require_match(manifest, {"schema_version": SCHEMA_VERSION}, "this program's")
        self.directory, self.manifest = directory, manifest
        self.offsets = np.asarray(manifest["row_offsets"], dtype=np.int64)
        self._temperatures = (float(manifest["alpha_temperature"]), float(manifest["delta_temperature"]))
        self._verified: set[int] = set()
        self._open: tuple[int, _Shard] | None = None
        self._groups: dict[tuple[int, int], SignalGroup] = {}

    @property
    def num_rows(self) -> int:
        return int(self.offsets[-1])

    def row(self, index: int) -> TrainingRow:
        place = index % self.num_rows
        number = int(np.searchsorted(self.offsets, place, side="right")) - 1
        if self._open is None or self._open[0] != number:
            if self._open is not None:
                self._open[1].close()
            self._open = (number, self._shard(number))
        shard = self._open[1]
        group = shard.group_of(place - int(self.offsets[number]))
        if (number, group) not in self._groups:
            if len(self._groups) > 1:
                self._groups.pop(next(iter(self._groups)))
            self._groups[number, group] = SignalGroup(shard.read(group), self._temperatures)
        return self._groups[number, group].row(place - int(self.offsets[number] + shard.starts[group]), index)

    def _shard(self, number: int) -> _Shard:
        path = storage.join(self.directory, self.manifest["shards"][number])
        if number not in self._verified:
            if problem := damage(path, self.manifest["shard_bytes"][number], self.manifest["shard_sha256"][number]):
                raise _damaged(path, problem)
            self._verified.add(number)
        return _Shard(path, int(self.offsets[number + 1] - self.offsets[number]))


def damage(path: str, num_bytes: int, sha256: str) -> str:
    """What is wrong with a shard's file, "" where it is the one that was written."""
    try:
        found = storage.size(path)
    except FileNotFoundError:
        return "it is not there"
    if found != num_bytes:
        return f"it has {found} bytes, {num_bytes} were written"
    digest = storage.sha256(path)
    return "" if digest == sha256 else f"its sha256 is {digest[:12]}..., {sha256[:12]}... was written"


def _damaged(path: str, problem: object) -> UserError:
    return UserError(f"signal shard {path} is damaged ({problem}); run pipelines/precompute.py --repair on this recipe")


class _Shard:
    """One open Parquet file and where its row groups begin."""

    def __init__(self, path: str, num_rows: int) -> None:
        import pyarrow.parquet as pq

        self.path = path
        try:
            self._stream = storage.open_input(path)
            self._file = pq.ParquetFile(self._stream)
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error
        metadata = self._file.metadata
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        if self.starts[-1] != num_rows:
            raise _damaged(path, f"it has {self.starts[-1]} rows, the manifest says {num_rows}")

    def group_of(self, place: int) -> int:
        return int(np.searchsorted(self.starts, place, side="right")) - 1

    def read(self, group: int) -> Any:
        try:
            return self._file.read_row_group(group)
        except (OSError, ValueError) as error:
            raise _damaged(self.path, error) from error

    def close(self) -> None:
        self._stream.close()
