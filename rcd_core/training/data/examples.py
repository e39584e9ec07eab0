"""Training rows from prepared examples: reads one chunk (a Parquet row group of `prepare`) after another and masks it.

Two chunks are in memory, whatever the size of the data. An example that cannot be trained on is found here with its
reason; the reader's limits decide whether that is an error.

Shapes: L tokens of an example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.io.retries import may_pass, patiently
from rcd_core.noise import NoiseSettings, count_set, mask_examples
from rcd_core.training.data.rows import RowOrder, TrainingRow
from rcd_core.training.objective import IGNORED

COLUMNS = ["example_id", "input_ids", "labels"]


@dataclass(frozen=True)
class Limits:
    """What a model accepts: ids below vocab_size, at most max_positions tokens."""

    vocab_size: int
    max_positions: int


@dataclass(frozen=True)
class Chunks:
    """For each chunk, in the order of the files: number of its file, row group in the file, rows."""

    file: tuple[int, ...]
    group: tuple[int, ...]
    rows: tuple[int, ...]

    @classmethod
    def from_manifest(cls, chunks: Mapping[str, Sequence[int]]) -> Chunks:
        """From `chunks` of prepare's manifest; opens no file."""
        file = tuple(chunks["file"])
        firsts = {number: file.index(number) for number in set(file)}
        return cls(file, tuple(i - firsts[number] for i, number in enumerate(file)), tuple(chunks["rows"]))

    @classmethod
    def of_files(cls, files: Sequence[str]) -> Chunks:
        """From the files' footers."""
        chunks = []
        for number, path in enumerate(files):
            with open_parquet(path) as parquet:
                metadata = parquet.metadata
                chunks += [(number, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)]
        file, group, rows = zip(*chunks, strict=True) if chunks else ((), (), ())
        return cls(file, group, rows)


class ExampleSource:
    """RowSource over Parquet files in the manifest's order.

    chunks: read from the files' footers if None. limits: with them an unusable example becomes a rejected row; without
    them `row` raises UserError, and ids and lengths are not checked. UserError also for files that cannot be read.
    """

    def __init__(
        self, files: Sequence[str], noise: NoiseSettings, chunks: Chunks | None = None, limits: Limits | None = None
    ) -> None:
        self.files, self.limits = list(files), limits
        self.chunks = chunks or Chunks.of_files(files)
        self.order = RowOrder(self.chunks.rows, noise)
        self._chunk = lru_cache(2)(self._read_chunk)
        self._masks = lru_cache(2)(self._mask_chunk)

    def row(self, index: int) -> TrainingRow:
        number, place, draw = self.order.locate(index)
        chunk = self._chunk(number)
        example_id, reason = chunk.example_ids[place], chunk.reasons[place]
        if reason:
            if self.limits is None:
                raise UserError(f"example {example_id!r} cannot be trained on: {reason}; remove or fix it")
            return TrainingRow.rejected(index, example_id, draw, reason)
        masked, p = self._masks(number, draw)
        input_ids, labels = (lists[place].astype(np.int64) for lists in (chunk.input_ids, chunk.labels))
        tokens = slice(chunk.labels.offsets[place], chunk.labels.offsets[place + 1])
        return TrainingRow(index, example_id, draw, input_ids, labels, masked[tokens], p[tokens])

    @patiently
    def _read_chunk(self, number: int) -> _Chunk:
        path, group = self.files[self.chunks.file[number]], self.chunks.group[number]
        with open_parquet(path) as parquet:
            table = parquet.read_row_group(group, columns=COLUMNS)
        if len(table) != self.chunks.rows[number]:
            raise UserError(
                f"examples {path}: row group {group} has {len(table)} rows, prepare's manifest says "
                f"{self.chunks.rows[number]}; repeat the stage: --redo prepare"
            )
        return _Chunk(table, self.limits)

    def _mask_chunk(self, number: int, draw: int) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        chunk = self._chunk(number)
        maskable = chunk.labels.values != IGNORED
        return mask_examples(maskable, chunk.labels.offsets, chunk.example_ids, draw, self.order.noise)


class _Chunk:
    """The examples of one chunk. reasons: why each cannot be trained on, "" if it can."""

    def __init__(self, table: Any, limits: Limits | None) -> None:
        names = table["example_id"].to_pylist()
        self.example_ids = [str(name or "") for name in names]
        input_ids, labels = _integers(table["input_ids"]), _integers(table["labels"])
        if input_ids is None or labels is None:
            empty = FlatLists.empty(len(names))
            self.input_ids, self.labels, self.reasons = empty, empty, ["wrong type"] * len(names)
        else:
            self.input_ids, self.labels = input_ids, labels
            self.reasons = _reasons(self.example_ids, input_ids, labels, limits)


def _reasons(example_ids: list[str], ids: FlatLists, labels: FlatLists, limits: Limits | None) -> list[str]:
    labelled = labels.values != IGNORED
    checks = [
        ("no example id", np.array([not name for name in example_ids])),
        ("empty", ids.lengths == 0),
        ("not one label per token", ids.lengths != labels.lengths),
        ("no labelled token", count_set(labelled, labels.offsets) == 0),
    ]
    if limits is not None:
        bad_ids, bad_labels = ((flat.values < 0) | (flat.values >= limits.vocab_size) for flat in (ids, labels))
        outside = count_set(bad_ids, ids.offsets) + count_set(bad_labels & labelled, labels.offsets)
        checks.append(("too long for the model's positions", ids.lengths > limits.max_positions))
        checks.append(("id outside the vocabulary", outside > 0))
    reasons = [""] * len(example_ids)
    for reason, failed in reversed(checks):  # the first failed check wins
        for place in np.flatnonzero(failed):
            reasons[place] = reason
    return reasons


class FlatLists:
    """An Arrow list column as one flat array with offsets; rows are views. A null number reads as -1."""

    def __init__(self, column: Any) -> None:
        array = column.combine_chunks()
        self.offsets: NDArray[np.int64] = array.offsets.to_numpy().astype(np.int64)
        values = array.values
        self.values = (values.fill_null(-1) if values.null_count else values).to_numpy(zero_copy_only=False)

    @classmethod
    def empty(cls, rows: int) -> FlatLists:
        lists = cls.__new__(cls)
        lists.offsets, lists.values = np.zeros(rows + 1, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return lists

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def __getitem__(self, index: int) -> NDArray[Any]:
        row: NDArray[Any] = self.values[self.offsets[index] : self.offsets[index + 1]]
        return row


def _integers(column: Any) -> FlatLists | None:
    """The lists, or None if they hold other values than whole numbers."""
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


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """An open ParquetFile; what fails while it is open becomes a UserError that names the file."""
    import pyarrow.parquet as pq

    try:
        with storage.open_input(path) as stream:
            yield pq.ParquetFile(stream, page_checksum_verification=True)
    except UserError:
        raise
    except (OSError, ValueError, LookupError) as error:
        if may_pass(error):
            raise
        raise UserError(f"examples {path} cannot be read ({error}); repeat the stage: --redo prepare") from error
