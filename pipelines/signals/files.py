"""The files of the stage `signals`, and the order in which they are written.

A shard is written under a temporary name and renamed; then its sidecar is written the same way, with the number of rows
and the hash of the shard's bytes. Readers ignore a shard without a valid sidecar, so a process may die between any two
of these steps. Two processes may even write the same shard: the bytes are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.training.data.signal_format import SCHEMA_VERSION, parquet_options, schema

BAD_ROWS = "bad_rows.parquet"
_BAD_ROWS = pa.schema(
    {"row": pa.int64(), "example_id": pa.string(), "draw": pa.int32(), "shard": pa.string(), "reason": pa.string()}
)


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.parquet"


def sidecar_path(directory: str, shard: int) -> str:
    return storage.join(directory, shard_name(shard) + ".json")


def valid_sidecar(directory: str, shard: int, first_row: int, rows: int) -> dict[str, Any] | None:
    """The sidecar of a shard that exists with these rows and the size that was written; otherwise None."""
    try:
        sidecar: dict[str, Any] = storage.read_json(sidecar_path(directory, shard))
        expected = {"schema_version": SCHEMA_VERSION, "first_row": first_row, "rows": rows}
        if any(sidecar.get(name) != value for name, value in expected.items()):
            return None
        complete = storage.size(storage.join(directory, shard_name(shard))) == sidecar["bytes"]
    except (FileNotFoundError, UserError, AttributeError):
        return None
    return sidecar if complete else None


def remove_shard(directory: str, shard: int) -> None:
    """Remove the sidecar first: a shard that is half removed must not look complete."""
    storage.remove(sidecar_path(directory, shard))
    storage.remove(storage.join(directory, shard_name(shard)))


def remove_leftovers(directory: str) -> None:
    """Remove the temporary files of killed writers."""
    files, inner = storage.filesystem(directory)
    for info in files.get_file_info(fs.FileSelector(inner, allow_not_found=True)):
        if info.is_file and info.base_name.startswith(".") and info.base_name.endswith(".tmp"):
            with suppress(FileNotFoundError):
                files.delete_file(info.path)


class _HashingStream:
    """A file to write to that counts and hashes (sha256) the bytes written."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._digest, self.num_bytes, self.closed = stream, hashlib.sha256(), 0, False

    def write(self, data: Any) -> int:
        if not self.closed:
            self._digest.update(data)
            self._stream.write(data)
            self.num_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        self.closed = True

    def sha256(self) -> str:
        return self._digest.hexdigest()


class ShardWriter:
    """Writes the row groups of one shard; counts rows and bytes for the sidecar."""

    def __init__(self, stream: Any, adaptive: bool) -> None:
        self._sink = _HashingStream(stream)
        self._parquet = pq.ParquetWriter(self._sink, schema(adaptive), **parquet_options(adaptive))
        self.rows = 0

    def write(self, table: pa.Table) -> None:
        self._parquet.write_table(table, row_group_size=len(table))
        self.rows += len(table)

    def abandon(self) -> None:
        """Give up a shard. Without this the Parquet writer would write a footer when it is freed."""
        self._sink.closed = True
        with suppress(Exception):
            self._parquet.close()

    def close(self) -> dict[str, Any]:
        """Finish the file. Returns the part of the sidecar that describes it."""
        self._parquet.close()
        return {"rows": self.rows, "bytes": self._sink.num_bytes, "sha256": self._sink.sha256()}


@contextmanager
def shard_writer(directory: str, shard: int, adaptive: bool) -> Iterator[ShardWriter]:
    """The shard appears under its name when the block ends without an error; close() the writer in the block."""
    with storage.open_output(storage.join(directory, shard_name(shard))) as stream:
        writer = ShardWriter(stream, adaptive)
        try:
            yield writer
        except BaseException:
            writer.abandon()
            raise


def write_sidecar(directory: str, shard: int, content: Mapping[str, Any]) -> None:
    storage.write_json(sidecar_path(directory, shard), {"schema_version": SCHEMA_VERSION, **content})


def write_bad_rows(directory: str, sidecars: Iterable[tuple[int, Mapping[str, Any]]]) -> str:
    """Write the table of rows that could not be used, shard by shard, from (shard, sidecar). Returns its path."""
    path = storage.join(directory, BAD_ROWS)
    with storage.open_output(path) as stream, pq.ParquetWriter(stream, _BAD_ROWS, compression="zstd") as writer:
        for shard, sidecar in sidecars:
            if sidecar["bad_rows"]:
                rows = [{**row, "shard": shard_name(shard)} for row in sidecar["bad_rows"]]
                writer.write_table(pa.Table.from_pylist(rows, schema=_BAD_ROWS))
    return path
