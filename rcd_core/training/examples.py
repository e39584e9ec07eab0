"""Prepared examples, a chunk at a time: a chunk is a row group of the Parquet files that `prepare` writes.

A reader holds two chunks, so its memory does not grow with the data. An example that cannot be trained on is not an
error here: it comes with the reason, and who reads it decides.

Shapes: L tokens of an example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcd_core import storage
from rcd_core.errors import UserError
from rcd_core.training.objective import IGNORED

_NONE = np.zeros(0, dtype=np.int64)
COLUMNS = ["example_id", "input_ids", "labels"]


@dataclass(frozen=True)
class Limits:
    """What a model can take: ids below vocab_size, at most max_positions tokens."""

    vocab_size: int
    max_positions: int


@dataclass(frozen=True)
class Chunks:
    """Where the chunks lie, in the order of the files: number of the file, row group in it, rows."""

    file: tuple[int, ...]
    group: tuple[int, ...]
    rows: tuple[int, ...]

    @classmethod
    def from_manifest(cls, chunks: Mapping[str, Sequence[int]]) -> Chunks:
        """From the `chunks` that prepare's manifest lists, without looking at the files."""
        file = tuple(chunks["file"])
        firsts = {number: file.index(number) for number in set(file)}
        return cls(file, tuple(i - firsts[number] for i, number in enumerate(file)), tuple(chunks["rows"]))

    @classmethod
    def of_files(cls, files: Sequence[str]) -> Chunks:
        """From the files' footers."""
        found = []
        for number, path in enumerate(files):
            with _opened(path) as parquet:
                metadata = parquet.metadata
                found += [(number, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)]
        file, group, rows = zip(*found, strict=True) if found else ((), (), ())
        return cls(file, group, rows)


class ChunkReader:
    """The last two chunks asked for."""

    def __init__(self, files: Sequence[str], chunks: Chunks) -> None:
        self.files, self.chunks = list(files), chunks
        self._held: dict[int, Chunk] = {}

    def chunk(self, number: int) -> Chunk:
        if number not in self._held:
            path = self.files[self.chunks.file[number]]
            with _opened(path) as parquet:
                table = parquet.read_row_group(self.chunks.group[number], columns=COLUMNS)
            if len(table) != self.chunks.rows[number]:
                raise UserError(
                    f"examples {path}: row group {self.chunks.group[number]} has {len(table)} rows, prepare's manifest "
                    f"says {self.chunks.rows[number]}; run full.py --redo prepare"
                )
            if len(self._held) > 1:
                self._held.pop(next(iter(self._held)))
            self._held[number] = Chunk(table)
        return self._held[number]


class Chunk:
    """The examples of one chunk in memory."""

    def __init__(self, table: Any) -> None:
        self.example_ids = table["example_id"].combine_chunks()
        self.input_ids, self.labels = _integers(table["input_ids"]), _integers(table["labels"])

    def example(
        self, place: int, limits: Limits | None
    ) -> tuple[str, NDArray[np.int64], NDArray[np.int64], str]:
        """(example id, ids (L,), labels (L,), why it cannot be trained on, or ""). limits None: any id and length."""
        example_id = str(self.example_ids[place].as_py() or "")
        if self.input_ids is None or self.labels is None:
            return example_id, _NONE, _NONE, "wrong type"
        ids, labels = self.input_ids[place].astype(np.int64), self.labels[place].astype(np.int64)
        return example_id, ids, labels, fault(ids, labels, limits) if example_id else "no example id"


def fault(ids: NDArray[np.int64], labels: NDArray[np.int64], limits: Limits | None) -> str:
    """Why ids and labels, (L,) each, cannot be trained on; "" where they can."""
    if not len(ids):
        return "empty"
    if len(ids) != len(labels):
        return "not one label per token"
    labelled = labels[labels != IGNORED]
    if not len(labelled):
        return "no labelled token"
    if limits is None:
        return ""
    if len(ids) > limits.max_positions:
        return "too long for the model's positions"
    if min(ids.min(), labelled.min()) < 0 or max(ids.max(), labelled.max()) >= limits.vocab_size:
        return "id outside the vocabulary"
    return ""


class FlatLists:
    """An Arrow list column as one flat array with offsets: rows are views. A missing number reads as -1."""

    def __init__(self, column: Any) -> None:
        array = column.combine_chunks()
        self.offsets = array.offsets.to_numpy()
        values = array.values
        self.values = (values.fill_null(-1) if values.null_count else values).to_numpy(zero_copy_only=False)

    def __getitem__(self, index: int) -> NDArray[Any]:
        row: NDArray[Any] = self.values[self.offsets[index] : self.offsets[index + 1]]
        return row


def _integers(column: Any) -> FlatLists | None:
    """The lists, or None where they do not hold whole numbers."""
    import pyarrow as pa

    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return None
    if pa.types.is_floating(kind.value_type):
        try:
            column = column.cast(pa.list_(pa.int64()))
        except pa.ArrowInvalid:
            return None
    return FlatLists(column) if pa.types.is_integer(column.type.value_type) else None


class _opened:  # noqa: N801 - used as a function
    """A Parquet file for the length of a block; what goes wrong in there becomes a UserError that names it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> Any:
        import pyarrow.parquet as pq

        try:
            self.stream = storage.open_input(self.path)
            return pq.ParquetFile(self.stream)
        except (OSError, ValueError) as error:
            raise self._explained(error) from error

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.stream.close()
        if isinstance(error, OSError | ValueError | LookupError) and not isinstance(error, UserError):
            raise self._explained(error) from error

    def _explained(self, error: BaseException) -> UserError:
        return UserError(f"examples {self.path} cannot be read ({error}); run full.py --redo prepare")
