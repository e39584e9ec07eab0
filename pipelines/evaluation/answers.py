"""Answers on disk while an evaluation runs, so that a killed evaluation resumes and loses a few seconds of work.

The stage evaluate writes Parquet files, an endpoint's answers are appended to one log:

    <directory>/<piece>.parquet                 a piece is what an actor decodes in one call
    <directory>/settings.json, answers.jsonl    a JSON object per answer
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
from rcd_core.io.threads import in_threads

KEY = ("arm", "threshold", "example_id", "sample")


class PieceWriter:
    """Writes the answers to one piece of work into one file, again every `flush_s` seconds and at the end. It goes on
    with the rows that the file has: a piece is written by one actor at a time, and small."""

    def __init__(
        self, path: str, schema: pa.Schema, flush_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path, self.schema, self.flush_s, self.clock = path, schema, flush_s, clock
        self.written = _read(path, schema) if storage.exists(path) else schema.empty_table()
        self.rows: list[dict[str, Any]] = []
        self.flushed = clock()

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.clock() - self.flushed >= self.flush_s:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            self.written = pa.concat_tables([self.written, pa.Table.from_pylist(self.rows, schema=self.schema)])
            self.rows = []
            with storage.open_output(self.path) as stream:
                pq.write_table(self.written, stream, compression="zstd")
        self.flushed = self.clock()


def read_answers(directory: str, schema: pa.Schema, keys: list[str]) -> pa.Table:
    """The rows of all files, sorted by `keys` and without duplicates. An actor of a killed job can outlive its driver
    for a moment and write rows that the next job decodes as well."""
    names = storage.list_files(directory, ".parquet")
    for inner in in_threads(lambda name: storage.list_files(name, ".parquet"), storage.list_directories(directory)):
        names += inner  # of an older release
    tables = in_threads(lambda name: _read(name, schema), names)
    table = pa.concat_tables([schema.empty_table(), *tables]).sort_by([(key, "ascending") for key in keys])
    is_first = np.ones(len(table), dtype=bool)
    if len(table) > 1:
        columns = [table[key].to_numpy(zero_copy_only=False) for key in keys]
        is_first[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return table.filter(pa.array(is_first))


def _read(path: str, schema: pa.Schema) -> pa.Table:
    with storage.open_input(path) as stream:
        table = pq.read_table(stream)
    for field in schema:
        if field.name not in table.column_names:  # an older release wrote the file
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(schema.names).cast(schema)


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
