"""Reads rows of JSON Lines and Parquet files one by one. Bad rows are reported and do not stop the reading."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Any

from rcd_core.errors import UserError
from rcd_core.io import storage

_FIRST_ROWS = 20  # read to find the columns of a .jsonl file
_DETAIL = 200  # characters kept of a bad row
# Column names that public datasets use. A column mapped by data.fields has no alternatives.
_INSTRUCTION, _INPUT = "instruction", "input"
_SPELLINGS: dict[str, tuple[str, ...]] = {"question": ("question", "problem", "prompt")}


class BadRow(Exception):
    """A row that cannot be used. `reason` is one of a few texts and is counted; `detail` identifies this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail[:_DETAIL]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file. number: line (JSON Lines) or row (Parquet), from 1. Exactly one of values and bad is set."""

    number: int
    values: dict[str, str] | None = None
    bad: BadRow | None = None


def read_rows(path: str, columns: Mapping[str, str]) -> Iterator[Row]:
    """Yield the rows of a .jsonl or .parquet file as texts. columns: field -> column.

    The column `question` may be called `problem` or `prompt` in the file. Numbers and UTF-8 bytes become text, blank
    lines are skipped.
    A column `input` next to a mapped `instruction` is added to the instruction after an empty line (Alpaca's format).
    Raises UserError if the file cannot be read.
    """
    names = [name for column in columns.values() for name in spellings(column)]
    with_input = _INSTRUCTION in names and _INPUT not in names
    for number, record in _records(path, [*names, *([_INPUT] if with_input else [])]):
        try:
            values = {field: _text(record, column) for field, column in columns.items()}
            if with_input and str(record.get(_INPUT) or "").strip():
                for field in (field for field, column in columns.items() if column == _INSTRUCTION):
                    values[field] = f"{values[field].rstrip()}\n\n{_text(record, _INPUT)}"
            yield Row(number, values=values)
        except BadRow as bad:
            yield Row(number, bad=bad)


def spellings(column: str) -> tuple[str, ...]:
    """Names that a column may have in a file, in order of preference."""
    return _SPELLINGS.get(column, (column,))


def check_columns(path: str, columns: Mapping[str, str], key: str) -> None:
    """Raise UserError, which names the recipe key, unless the file is readable and its first rows have all columns."""
    if path.endswith(".parquet"):
        with _readable(path):
            from pyarrow import parquet

            with storage.open_input(path) as stream:
                present = parquet.read_schema(stream).names
    else:
        records = [record for _, record in islice(_records(path, []), _FIRST_ROWS)]
        if not records:
            raise UserError(f"{key}: {path} has no rows")
        objects = [record for record in records if isinstance(record, dict)]
        if not objects:
            raise UserError(f"{key}: none of the first {len(records)} lines of {path} is a JSON object (JSON Lines)")
        present = sorted({str(name) for record in objects for name in record})
    for field, column in columns.items():
        if not set(spellings(column)) & set(present):
            raise UserError(
                f"{key}: {path} has no column {column!r} for our field {field!r}; it has {', '.join(present)}; "
                f"set data.fields.{field} to one of them"
            )


def _records(path: str, columns: list[str]) -> Iterator[tuple[int, Any]]:
    """Yield (number, record); the record of a bad row is a BadRow or not a mapping."""
    with _readable(path):
        if path.endswith(".parquet"):
            from pyarrow import parquet

            with storage.open_input(path) as stream, parquet.ParquetFile(stream) as file:
                number = 0
                for batch in file.iter_batches(batch_size=1024, columns=columns):
                    for record in batch.to_pylist():
                        number += 1
                        yield number, record
        else:
            with storage.open_input(path) as stream:
                for number, line in enumerate(io.BufferedReader(stream), start=1):
                    if not line.strip():
                        continue
                    try:
                        yield number, json.loads(line)
                    except ValueError as error:  # including invalid UTF-8
                        yield number, BadRow("not JSON", f"{error}: {line[:80]!r}")


def _text(record: Any, column: str) -> str:
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, dict):
        raise BadRow("not a JSON object", repr(record))
    value = next((record[name] for name in spellings(column) if record.get(name) is not None), None)
    if value is None or value != value:  # a missing number may be NaN
        raise BadRow(f"missing {column!r}", repr(record))
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    elif isinstance(value, Decimal):  # of a Parquet column, with all its digits
        value = f"{value:f}"
    elif isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if not isinstance(value, str):
        raise BadRow(f"{column!r} is no text", repr(value))
    if not value.strip():
        raise BadRow(f"empty {column!r}", repr(record))
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, or bytes that are not UTF-8
        raise BadRow(f"{column!r} is not valid Unicode", ascii(value)) from error
    return value


@contextmanager
def _readable(path: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"data file {path} does not exist; correct the path in data.train or data.test") from error
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"data file {path} cannot be read: {error}") from error
