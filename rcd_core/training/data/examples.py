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

from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.noise import NoiseSettings, mask_examples
from rcd_core.training.data.rows import RowOrder, TrainingRow
from rcd_core.training.objective import IGNORED

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
    """The last two chunks asked for. limits: what makes an example unusable, besides being malformed."""

    def __init__(self, files: Sequence[str], chunks: Chunks, limits: Limits | None = None) -> None:
        self.files, self.chunks, self.limits = list(files), chunks, limits
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
            self._held[number] = Chunk(table, self.limits)
        return self._held[number]


class Chunk:
    """The examples of one chunk in memory. reasons: why each cannot be trained on, "" where it can."""

    def __init__(self, table: Any, limits: Limits | None) -> None:
        names = table["example_id"].to_pylist()
        self.example_ids = [str(name or "") for name in names]
        input_ids, labels = _integers(table["input_ids"]), _integers(table["labels"])
        if input_ids is None or labels is None:
            empty = FlatLists.of(len(names))
            self.input_ids, self.labels, self.reasons = empty, empty, ["wrong type"] * len(names)
        else:
            self.input_ids, self.labels = input_ids, labels
            self.reasons = _reasons(self.example_ids, input_ids, labels, limits)


def _reasons(example_ids: list[str], ids: FlatLists, labels: FlatLists, limits: Limits | None) -> list[str]:
    """Why each example cannot be trained on; limits None: ids and lengths are not judged."""
    labelled = labels.values != IGNORED
    faults = [
        ("no example id", np.array([not name for name in example_ids])),
        ("empty", ids.lengths == 0),
        ("not one label per token", ids.lengths != labels.lengths),
        ("no labelled token", labels.count(labelled) == 0),
    ]
    if limits is not None:
        strange = [(flat.values < 0) | (flat.values >= limits.vocab_size) for flat in (ids, labels)]
        outside = ids.count(strange[0]) + labels.count(strange[1] & labelled)
        faults.append(("too long for the model's positions", ids.lengths > limits.max_positions))
        faults.append(("id outside the vocabulary", outside > 0))
    reasons = [""] * len(example_ids)
    for reason, struck in reversed(faults):  # the first that applies
        for place in np.flatnonzero(struck):
            reasons[place] = reason
    return reasons


class FlatLists:
    """Lists as one flat array with offsets: rows are views. From an Arrow list column; a missing number reads as -1."""

    def __init__(self, column: Any) -> None:
        array = column.combine_chunks()
        self.offsets: NDArray[np.int64] = array.offsets.to_numpy().astype(np.int64)
        values = array.values
        self.values = (values.fill_null(-1) if values.null_count else values).to_numpy(zero_copy_only=False)

    @classmethod
    def of(cls, rows: int) -> FlatLists:
        """So many empty lists."""
        lists = cls.__new__(cls)
        lists.offsets, lists.values = np.zeros(rows + 1, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return lists

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def count(self, flags: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many of the flags, one per value, are set in each row."""
        upto = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
        return np.asarray(upto[self.offsets[1:]] - upto[self.offsets[:-1]])

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


class ExampleSource:
    """Prepared examples (Parquet, in the manifest's order) with noise drawn by hash; holds two chunks of them.

    chunks: where the files' row groups lie, from their footers if not given. limits: what the model can take; with
    them an example that cannot be used becomes a row with a reason, without them it raises UserError.
    """

    def __init__(
        self, files: Sequence[str], noise: NoiseSettings, chunks: Chunks | None = None, limits: Limits | None = None
    ) -> None:
        chunks = chunks or Chunks.of_files(files)
        self.order = RowOrder(chunks.rows, noise)
        self.limits = limits
        self._reader = ChunkReader(files, chunks, limits)
        self._masks: dict[tuple[int, int], tuple[NDArray[np.bool_], NDArray[np.float64]]] = {}

    def row(self, index: int) -> TrainingRow:
        number, place, draw = self.order.locate(index)
        chunk = self._reader.chunk(number)
        example_id, reason = chunk.example_ids[place], chunk.reasons[place]
        if reason:
            if self.limits is None:
                raise UserError(f"example {example_id!r} cannot be trained on: {reason}; remove it or mend it")
            return TrainingRow.rejected(index, example_id, draw, reason)
        if (number, draw) not in self._masks:
            if len(self._masks) > 1:
                self._masks.pop(next(iter(self._masks)))
            maskable = chunk.labels.values != IGNORED
            found = mask_examples(maskable, chunk.labels.offsets, chunk.example_ids, draw, self.order.noise)
            self._masks[number, draw] = found
        masked, p = self._masks[number, draw]
        input_ids, labels = (lists[place].astype(np.int64) for lists in (chunk.input_ids, chunk.labels))
        part = slice(chunk.labels.offsets[place], chunk.labels.offsets[place + 1])
        return TrainingRow(index, example_id, draw, input_ids, labels, masked[part], p[part])
