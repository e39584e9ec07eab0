"""The sidecars of complete shards: one listing, a small index, and threads for what the index does not have.

The index, index-*.parquet, repeats the content of sidecars, so that a job with thousands of shards resumes after a few
requests. It may be missing or old: an entry counts only if its shard and sidecar are listed and older than the index.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.signals import files
from pipelines.signals.plan import SignalJob
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.io.threads import in_threads

INDEXED = 512  # sidecars in a file of the index; a killed driver leaves fewer that are not in it
_INDEX = "index-"
_SCHEMA = pa.schema({"shard": pa.int32(), "sidecar": pa.string()})


class Sidecars:
    """The sidecars of a job's shards. `add` each that is read or made; `save` at the end."""

    def __init__(self, job: SignalJob) -> None:
        self.job = job
        self._new: list[tuple[int, str]] = []
        self._num_files = 0

    def complete(self, listed: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(shard, sidecar) of every shard that exists with its rows and the size that was written, in order.

        listed: storage.listing of the job's directory.
        """
        index = self._index(listed)
        present = [shard for shard in range(self.job.num_shards) if files.sidecar_name(shard) in listed]
        read = [shard for shard in present if shard not in index]
        found = index | dict(zip(read, in_threads(self._read, read), strict=True))
        for shard in present:
            sidecar, info = found[shard], listed.get(files.shard_name(shard))
            if sidecar and info and self.job.describes(sidecar, shard) and info.size == sidecar["bytes"]:
                if shard not in index:
                    self.add(shard, sidecar)
                yield shard, sidecar

    def add(self, shard: int, sidecar: dict[str, Any]) -> None:
        """Remember a sidecar. Writes a file of the index once there are enough."""
        self._new.append((shard, json.dumps(sidecar)))
        if len(self._new) == INDEXED:
            self.save()

    def save(self) -> None:
        """Write what is not in the index yet."""
        if not self._new:
            return
        shards, sidecars = zip(*self._new, strict=True)
        path = storage.join(self.job.directory, f"{_INDEX}{self._num_files:05d}.parquet")
        with storage.open_output(path) as stream:
            pq.write_table(pa.table([shards, sidecars], schema=_SCHEMA), stream, compression="zstd")
        self._new, self._num_files = [], self._num_files + 1

    def _index(self, listed: dict[str, Any]) -> dict[int, dict[str, Any]]:
        names = sorted(name for name in listed if name.startswith(_INDEX))
        self._num_files = 1 + max((int(name.removeprefix(_INDEX).split(".")[0]) for name in names), default=-1)
        paths = [storage.join(self.job.directory, name) for name in names]
        index: dict[int, dict[str, Any]] = {}
        for name, table in zip(names, in_threads(_read_table, paths), strict=True):
            for row in table.to_pylist():
                of_shard = [listed.get(part(row["shard"])) for part in (files.shard_name, files.sidecar_name)]
                if all(info and (info.mtime_ns or 0) < (listed[name].mtime_ns or 0) for info in of_shard):
                    index[row["shard"]] = json.loads(row["sidecar"])
        return index

    def _read(self, shard: int) -> dict[str, Any] | None:
        try:
            sidecar = storage.read_json(storage.join(self.job.directory, files.sidecar_name(shard)))
        except (FileNotFoundError, UserError):
            return None
        return sidecar if isinstance(sidecar, dict) else None


def _read_table(path: str) -> pa.Table:
    try:
        with storage.open_input(path) as stream:
            return pq.read_table(stream, schema=_SCHEMA)
    except (FileNotFoundError, pa.ArrowInvalid):  # the sidecars themselves are read instead
        return _SCHEMA.empty_table()
