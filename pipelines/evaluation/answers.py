"""Answers on disk while an evaluation runs, so that a killed evaluation resumes and loses a few seconds of work.

The stage evaluate writes Parquet files, an endpoint's answers are appended to one log:

    <directory>/<shard>/0000.parquet, 0001.parquet, ...   a shard is written by one actor
    <directory>/settings.json, answers.jsonl              a JSON object per answer
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.run.keys import differences
from rcd_core.errors import UserError
from rcd_core.io import storage

KEY = ("arm", "threshold", "example_id", "sample")


class ShardWriter:
    """Writes the rows of one shard: a file every `flush_s` seconds, and one at the end."""

    def __init__(
        self, directory: str, schema: pa.Schema, flush_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.directory, self.schema, self.flush_s, self.clock = directory, schema, flush_s, clock
        self.rows: list[dict[str, Any]] = []
        self.num_files = len(storage.list_files(directory, ".parquet"))
        self.flushed = clock()

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.clock() - self.flushed >= self.flush_s:
            self.flush()

    def flush(self) -> None:
        """Write the rows. They share their seconds equally: the order in which answers of a batch finish does not show
        what each of them cost."""
        if self.rows:
            seconds = sum(row["seconds"] for row in self.rows) / len(self.rows)
            rows = [{**row, "seconds": seconds} for row in self.rows]
            with storage.open_output(storage.join(self.directory, f"{self.num_files:04d}.parquet")) as stream:
                pq.write_table(pa.Table.from_pylist(rows, schema=self.schema), stream, compression="zstd")
            self.rows, self.num_files = [], self.num_files + 1
        self.flushed = self.clock()


def read_shard(directory: str, schema: pa.Schema) -> pa.Table:
    """The rows of one shard; none if it does not exist."""
    tables = [schema.empty_table()]
    for name in storage.list_files(directory, ".parquet"):
        with storage.open_input(name) as stream:
            table = pq.read_table(stream)
        for field in schema:
            if field.name not in table.column_names:  # an older release wrote the file
                table = table.append_column(field, pa.nulls(len(table), field.type))
        tables.append(table.select(schema.names).cast(schema))
    return pa.concat_tables(tables)


def read_shards(directory: str, schema: pa.Schema, keys: list[str]) -> pa.Table:
    """The rows of all shards, sorted by `keys` and without duplicates. An actor of a killed job can outlive its driver
    for a moment and write rows that the next job decodes as well."""
    shards = [read_shard(shard, schema) for shard in storage.list_directories(directory)]
    table = pa.concat_tables([schema.empty_table(), *shards]).sort_by([(key, "ascending") for key in keys])
    is_first = np.ones(len(table), dtype=bool)
    if len(table) > 1:
        columns = [table[key].to_numpy(zero_copy_only=False) for key in keys]
        is_first[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return table.filter(pa.array(is_first))


class AnswerLog:
    """Appends an endpoint's answers to a file on a local disk.

    fingerprint: everything that decides the answers, as keys.differences compares it. Raises UserError if the directory
    has answers to other settings.
    """

    def __init__(self, directory: str, fingerprint: Mapping[str, Any]) -> None:
        if storage.is_uri(directory):
            raise UserError(f"--output is {directory}; the answers of an endpoint need a local disk")
        self.path = Path(directory, "answers.jsonl")
        settings = Path(directory, "settings.json")
        if settings.exists():
            lines = differences(json.loads(settings.read_text()), json.loads(json.dumps(fingerprint)))
            if lines:
                raise UserError(
                    "\n  ".join([f"--output {directory} has answers to other settings:", *lines])
                    + "\nGive another --output, or restore the old settings."
                )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(str(settings), dict(fingerprint))
        self.rows = self._read()
        self._file = self.path.open("a", encoding="utf-8")

    def done(self) -> set[tuple[Any, ...]]:
        """(method, threshold, example id, sample) of the logged answers."""
        return {_key(row) for row in self.rows}

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _read(self) -> list[dict[str, Any]]:
        """Each answer once. Truncates a last line that a kill has left incomplete."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if complete != content:
            self.path.write_bytes(complete)
        rows = [json.loads(line) for line in complete.splitlines()]
        return list({_key(row): row for row in rows}.values())


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)
