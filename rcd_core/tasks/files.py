"""Records of data files, one by one: JSON Lines, JSON arrays, CSV and Parquet; all but Parquet also compressed by gzip.

A file of any size is read as a stream.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from rcd_core.errors import UserError
from rcd_core.io import storage

TEXT_SUFFIXES = (".jsonl", ".json", ".csv")
SUFFIXES = (".parquet", *TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES))
_FIRST_ROWS = 20  # read to find the columns of a file that does not list them
_DETAIL = 200  # characters kept of a bad row
_CHUNK = 1 << 20  # characters of a JSON array read at once
_LONGEST = 1 << 28  # characters of one element of a JSON array


class BadRow(Exception):
    """A row that cannot be used. `reason` is one of a few texts and is counted; `detail` identifies this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail[:_DETAIL]


def records(path: str, columns: Sequence[str] = ()) -> Iterator[tuple[int, Any]]:
    """Yield (number, record) from 1: the line of JSON Lines, else the row. A bad row is a BadRow or no mapping.

    columns: those to read of a Parquet file; () reads all. Raises UserError if the file cannot be read.
    """
    with _readable(path):
        if path.endswith(".parquet"):
            yield from enumerate(_parquet(path, columns), start=1)
            return
        with storage.open_input(path) as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
            kind = path.removesuffix(".gz").rpartition(".")[2]
            buffered = io.BufferedReader(stream)
            if kind == "csv":
                yield from _csv(buffered)
            elif kind == "json" and buffered.peek(64).lstrip()[:1] == b"[":
                yield from enumerate(_array(buffered, path), start=1)
            else:
                yield from _lines(buffered)


def columns_in(path: str, key: str) -> list[str]:
    """The columns of a Parquet file, else those of the first rows. key: the recipe key, for errors.

    Raises UserError if the file cannot be read, or if its first rows are no objects.
    """
    if path.endswith(".parquet"):
        with _readable(path):
            from pyarrow import parquet

            with storage.open_input(path) as stream:
                return list(parquet.read_schema(stream).names)
    first = [record for _, record in islice(records(path), _FIRST_ROWS)]
    if not first:
        raise UserError(f"{key}: {path} has no rows")
    objects = [record for record in first if isinstance(record, dict)]
    if not objects:
        raise UserError(f"{key}: none of the first {len(first)} rows of {path} is a JSON object")
    return sorted({str(name) for record in objects for name in record})


def _parquet(path: str, columns: Sequence[str]) -> Iterator[Any]:
    from pyarrow import parquet

    with storage.open_input(path) as stream, parquet.ParquetFile(stream) as file:
        present = [name for name in columns if name in file.schema_arrow.names] if columns else None
        for batch in file.iter_batches(batch_size=1024, columns=present):
            yield from batch.to_pylist()


def _lines(stream: io.BufferedReader) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:  # including invalid UTF-8
                yield number, BadRow("not JSON", f"{error}: {line[:80]!r}")


def _csv(stream: io.BufferedReader) -> Iterator[tuple[int, Any]]:
    """With a header. Bytes that are not UTF-8 become half surrogates, which no text may contain."""
    csv.field_size_limit(sys.maxsize)  # the default refuses long answers
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    number = 0
    try:
        for number, row in enumerate(csv.DictReader(text, restkey="", strict=True), start=1):
            if "" in row or None in row.values():
                yield number, BadRow("not as many cells as columns", repr(row))
            else:
                yield number, row
    except csv.Error as error:
        raise ValueError(f"row {number + 1}: {error}") from error


def _array(stream: io.BufferedReader, path: str) -> Iterator[Any]:
    """The elements of a JSON array. Raises ValueError at the first one that is no JSON: what follows is not known."""
    text = io.TextIOWrapper(stream, encoding="utf-8")
    decoder, buffer, at_end, needs_comma = json.JSONDecoder(), text.read(_CHUNK).lstrip()[1:], False, False
    while True:
        buffer = buffer.lstrip()
        if needs_comma and buffer[:1] == ",":
            buffer, needs_comma = buffer[1:].lstrip(), False
        elif buffer[:1] == "]":
            return
        elif needs_comma and buffer:
            raise ValueError(f"the array has no comma before {buffer[:40]!r}")
        try:
            value, end = decoder.raw_decode(buffer)
            if end < len(buffer) or at_end:  # a number may go on in the next chunk
                buffer, needs_comma = buffer[end:], True
                yield value
                continue
        except ValueError as error:
            if at_end or len(buffer) > _LONGEST:
                raise ValueError(f"the array is cut off or no JSON: {error.args[0]}") from error
        more = text.read(max(_CHUNK, len(buffer)))
        at_end, buffer = not more, buffer + more


@contextmanager
def _readable(path: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"data file {path} does not exist; correct its path") from error
    except (OSError, EOFError, ValueError, pa.ArrowException) as error:
        raise UserError(f"data file {path} cannot be read: {error}") from error
