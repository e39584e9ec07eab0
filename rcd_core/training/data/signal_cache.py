"""Training rows from the reference-signal cache, which the stage `signals` writes.

Shards are Parquet files of consecutive rows; the manifest lists where each begins and its SHA-256. A shard is verified
when it is first opened. Two row groups are in memory, whatever the size of the cache. Every rank reads all row groups
in order and takes its own rows from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np

from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.io.retries import may_pass, patiently
from rcd_core.noise import NoiseSettings
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.data.signal_format import SCHEMA_VERSION, SignalGroup

_SHARED = "reference and target must share it: choose another reference.start, then run full.py --redo signals"
_REMEDIES = {
    "schema_version": "another version of this program wrote them: run full.py --redo signals",
    "family": _SHARED,
    "vocab_size": _SHARED,
    "mask_token_id": _SHARED,
}


def require_match(manifest: Mapping[str, Any], expected: Mapping[str, Any], owner: str) -> None:
    """UserError with the field, both values and the remedy if the signals were computed for something else. owner: of
    the expected values, as "the recipe's"."""
    for name, value in expected.items():
        cached = manifest.get(name)
        if cached != value:
            remedy = _REMEDIES.get(name, "restore that setting, or run full.py --redo signals")
            raise UserError(f"the signals' {name} is {cached!r} but {owner} is {value!r}; {remedy}")


def noise_record(noise: NoiseSettings) -> dict[str, Any]:
    """Everything that decides the masks, as stored in the manifest."""
    unit = "example" if noise.block_length is None else f"block of {noise.block_length} tokens"
    schedule = f"p = (1 - eps) t + eps, t uniform in [0, 1) per {unit}"
    record = {"seed": noise.seed, "draws": noise.draws, "eps": noise.eps, "schedule": schedule}
    if noise.complementary:
        record["complementary"] = True
    if noise.layout == "single":
        return record
    return record | {name: getattr(noise, name) for name in ("layout", "block_length", "group_blocks")}


def noise_of(record: Mapping[str, Any]) -> NoiseSettings:
    """What of a noise record decides the layout of a row, besides its masks."""
    return NoiseSettings(**{name: value for name, value in record.items() if name != "schedule"})


class SignalSource:
    """RowSource over the cache; row g is the cache's row g - first_row mod its number of rows.

    manifest: the summary of the stage `signals`. UserError: the manifest is of another schema version, or a shard is
    missing or damaged.
    """

    def __init__(self, directory: str, manifest: Mapping[str, Any]) -> None:
        require_match(manifest, {"schema_version": SCHEMA_VERSION}, "this program's")
        self.directory, self.manifest = directory, manifest
        self.offsets = np.asarray(manifest["row_offsets"], dtype=np.int64)
        self._temperatures = (float(manifest["alpha_temperature"]), float(manifest["delta_temperature"]))
        self._verified: set[int] = set()
        self._open: tuple[int, _Shard] | None = None
        self._group = lru_cache(2)(self._read_group)

    @property
    def num_rows(self) -> int:
        return int(self.offsets[-1])

    def row(self, index: int) -> TrainingRow:
        place = (index - int(self.manifest.get("first_row", 0))) % self.num_rows
        number = int(np.searchsorted(self.offsets, place, side="right")) - 1
        shard, place = self._shard(number), place - int(self.offsets[number])
        group = int(np.searchsorted(shard.starts, place, side="right")) - 1
        return self._group(number, group).row(place - int(shard.starts[group]), index)

    @patiently
    def _read_group(self, number: int, group: int) -> SignalGroup:
        try:
            return SignalGroup(self._shard(number).read(group), self._temperatures)
        except OSError:
            self._close()  # a stale handle stays stale
            raise

    def _shard(self, number: int) -> _Shard:
        if self._open is not None and self._open[0] == number:
            return self._open[1]
        self._close()
        path = storage.join(self.directory, self.manifest["shards"][number])
        if number not in self._verified:
            if problem := damage(path, self.manifest["shard_bytes"][number], self.manifest["shard_sha256"][number]):
                raise _damaged(path, problem)
            self._verified.add(number)
        shard = _Shard(path, int(self.offsets[number + 1] - self.offsets[number]))
        self._open = (number, shard)
        return shard

    def _close(self) -> None:
        if self._open is not None:
            with suppress(OSError):
                self._open[1].close()
            self._open = None


def damage(path: str, num_bytes: int, sha256: str) -> str:
    """How a shard differs from the one that was written; "" if it does not."""
    try:
        size = storage.size(path)
    except FileNotFoundError:
        return "it is missing"
    if size != num_bytes:
        return f"it has {size} bytes, {num_bytes} were written"
    digest = storage.sha256(path)
    return "" if digest == sha256 else f"its sha256 is {digest[:12]}..., {sha256[:12]}... was written"


def _damaged(path: str, problem: object) -> UserError:
    return UserError(f"signal shard {path} is damaged ({problem}); run pipelines/precompute.py --repair on this recipe")


def _problem(path: str, error: Exception) -> Exception:
    """The error itself if the storage may answer later."""
    return error if may_pass(error) else _damaged(path, error)


class _Shard:
    """An open Parquet file. starts: the first row of each row group, and the number of rows."""

    def __init__(self, path: str, num_rows: int) -> None:
        import pyarrow.parquet as pq

        self.path = path
        try:
            self._stream = storage.open_input(path)
            self._file = pq.ParquetFile(self._stream)
        except (OSError, ValueError) as error:
            raise _problem(path, error) from error
        metadata = self._file.metadata
        sizes = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        if self.starts[-1] != num_rows:
            raise _damaged(path, f"it has {self.starts[-1]} rows, the manifest says {num_rows}")

    def read(self, group: int) -> Any:
        try:
            return self._file.read_row_group(group)
        except (OSError, ValueError) as error:
            raise _problem(self.path, error) from error

    def close(self) -> None:
        self._stream.close()
