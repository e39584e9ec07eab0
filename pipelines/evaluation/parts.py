"""Rows on disk as they come: a killed evaluation loses the answers of a few seconds, not of a piece of work.

    <directory>/<piece>/0000.parquet, 0001.parquet, ...

A piece is written by one actor. What lies there is the truth: an actor that begins a piece again, and a job that comes
after a killed one, go on with what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rcd_core.io import storage


class PartWriter:
    """Writes rows of one piece, a file whenever `flush_s` seconds have passed since the last one, and at the end."""

    def __init__(
        self, directory: str, schema: pa.Schema, flush_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.directory, self.schema, self.flush_s, self.clock = directory, schema, flush_s, clock
        self.rows: list[dict[str, Any]] = []
        self.number = len(storage.list_files(directory, ".parquet"))
        self.written = clock()

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.clock() - self.written >= self.flush_s:
            self.flush()

    def flush(self) -> None:
        """Spent seconds are shared by the rows of a file: which of them finished first says nothing of its cost."""
        if self.rows:
            seconds = sum(row["seconds"] for row in self.rows) / len(self.rows)
            rows = [{**row, "seconds": seconds} for row in self.rows]
            with storage.open_output(storage.join(self.directory, f"{self.number:04d}.parquet")) as stream:
                pq.write_table(pa.Table.from_pylist(rows, schema=self.schema), stream, compression="zstd")
            self.rows, self.number = [], self.number + 1
        self.written = self.clock()


def read_piece(directory: str, schema: pa.Schema) -> pa.Table:
    """All rows of one piece, none where it was not begun."""
    tables = [schema.empty_table()]
    for name in storage.list_files(directory, ".parquet"):
        with storage.open_input(name) as stream:
            tables.append(pq.read_table(stream).cast(schema))
    return pa.concat_tables(tables)


def read_parts(directory: str, schema: pa.Schema, keys: list[str]) -> pa.Table:
    """The rows of all pieces, sorted by `keys`, each once: an actor of a job that was killed can outlive its driver by
    a moment and finish what the next job has begun."""
    pieces = [read_piece(piece, schema) for piece in storage.list_directories(directory)]
    table = pa.concat_tables([schema.empty_table(), *pieces]).sort_by([(key, "ascending") for key in keys])
    new = np.ones(len(table), dtype=bool)
    if len(table) > 1:
        columns = [table[key].to_numpy(zero_copy_only=False) for key in keys]
        new[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return table.filter(pa.array(new))
