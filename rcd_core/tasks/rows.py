"""Rows of data files as a task's fields or as conversations. Bad rows are reported and do not stop the reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rcd_core.errors import UserError
from rcd_core.tasks.dialects import DIALECTS, Conversation, Dialect, conversation, find_dialect
from rcd_core.tasks.files import BadRow, columns_in, records

# Column names that public datasets use. A column mapped by data.fields has no alternatives.
_INSTRUCTION, _INPUT = "instruction", "input"
_SPELLINGS: dict[str, tuple[str, ...]] = {"question": ("question", "problem", "prompt")}
OWN_COLUMNS = "columns"  # data.dialect: the task's own


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file. number: line (JSON Lines) or row, from 1. One of values, conversation and bad is set."""

    number: int
    values: dict[str, str] | None = None
    conversation: Conversation | None = None
    bad: BadRow | None = None


def choose_dialect(
    path: str,
    columns: Mapping[str, str],
    key: str,
    chosen: str | None = None,
    conversations: bool = True,
    remedy: str = "set data.fields.{field} to one of them",
) -> Dialect | None:
    """The dialect of a file's conversations; None if its rows have the task's columns, which come first.

    columns: field of the task -> column. chosen: `data.dialect`. key: the recipe key, for errors. conversations:
    whether these may stand for the task's fields. remedy: how to name another column for a field. Raises UserError,
    with the columns that there are, if a file has neither.
    """
    present = columns_in(path, key)
    if chosen is not None and chosen != OWN_COLUMNS:
        dialect = DIALECTS[chosen]
        missing = sorted(set(dialect.columns) - set(present))
        if missing:
            raise UserError(
                f"{key}: {path} has no column {missing[0]!r} of dialect {chosen}; it has {', '.join(present)}; set "
                "data.dialect to null"
            )
        return dialect
    absent = [(f, column) for f, column in columns.items() if not set(spellings(column)) & set(present)]
    if not absent:
        return None
    found = find_dialect(present) if conversations and chosen is None else None
    if found is None:
        field, column = absent[0]
        raise UserError(
            f"{key}: {path} has no column {column!r} for our field {field!r}; it has {', '.join(present)}; "
            f"{remedy.format(field=field)}"
        )
    return found


def check_columns(path: str, columns: Mapping[str, str], key: str) -> None:
    """Raise UserError, which names the recipe key, unless the file is readable and its first rows have all columns."""
    choose_dialect(path, columns, key, conversations=False)


def read_rows(
    path: str, columns: Mapping[str, str], dialect: Dialect | None = None, keep_reasoning: bool = True
) -> Iterator[Row]:
    """Yield the rows of a file (files.py) as texts, or as conversations of a dialect. columns: field -> column.

    The column `question` may be called `problem` or `prompt` in the file. Numbers and UTF-8 bytes become text, blank
    lines are skipped.
    A column `input` next to a mapped `instruction` is added to the instruction after an empty line (Alpaca's format).
    Raises UserError if the file cannot be read.
    """
    if dialect is not None:
        for number, record in records(path, (*dialect.columns, *dialect.optional)):
            try:
                turns = dialect.read(_object(record))
                yield Row(number, conversation=conversation(turns, keep_reasoning))
            except BadRow as bad:
                yield Row(number, bad=bad)
        return
    names = [name for column in columns.values() for name in spellings(column)]
    with_input = _INSTRUCTION in names and _INPUT not in names
    for number, record in records(path, [*names, *([_INPUT] if with_input else [])]):
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


def _object(record: Any) -> dict[str, Any]:
    if isinstance(record, BadRow):
        raise record
    if not isinstance(record, dict):
        raise BadRow("not a JSON object", repr(record))
    return record


def _text(record: Any, column: str) -> str:
    record = _object(record)
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
