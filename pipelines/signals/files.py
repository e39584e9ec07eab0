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

from rcd_core.io import storage
from rcd_core.training.data.signal_format import SCHEMA_VERSION, parquet_options, schema

BAD_ROWS = "bad_rows.parquet"
_BAD_ROWS = pa.schema(
    {"row": pa.int64(), "example_id": pa.string(), "draw": pa.int32(), "shard": pa.string(), "reason": pa.string()}
)


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.parquet"


def sidecar_name(shard: int) -> str:
    return shard_name(shard) + ".json"


def remove_shard(directory: str, shard: int) -> None:
    """Remove the sidecar first: a shard that is half removed must not look complete."""
    storage.remove(storage.join(directory, sidecar_name(shard)))
    storage.remove(storage.join(directory, shard_name(shard)))


def remove_leftovers(directory: str, names: Iterable[str]) -> None:
    """Remove the temporary files of killed writers. names: of all files in the directory."""
    for name in names:
        if name.startswith(".") and name.endswith(".tmp"):
            storage.remove(storage.join(directory, name))


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


def write_sidecar(directory: str, shard: int, content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the whole sidecar."""
    sidecar = {"schema_version": SCHEMA_VERSION, **content}
    storage.write_json(storage.join(directory, sidecar_name(shard)), sidecar)
    return sidecar


def bad_rows(shard: int, sidecar: Mapping[str, Any]) -> pa.Table:
    """The rows of a shard that could not be used."""
    rows = [{**row, "shard": shard_name(shard)} for row in sidecar["bad_rows"]]
    return pa.Table.from_pylist(rows, schema=_BAD_ROWS)


def write_bad_rows(directory: str, tables: Iterable[pa.Table]) -> str:
    """Write the rows that could not be used. Returns the path."""
    path = storage.join(directory, BAD_ROWS)
    with storage.open_output(path) as stream:
        pq.write_table(pa.concat_tables([_BAD_ROWS.empty_table(), *tables]), stream, compression="zstd")
    return path
