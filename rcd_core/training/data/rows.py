"""Training rows: what one is, examples with noise made on the spot, and rows side by side as a batch.

Row g of a run is a pure function of the recipe (row_order.py). ExampleSource here and SignalSource (signal_rows.py)
follow it, so a baseline trained on examples sees the target's very tokens and masks.

Shapes: B rows, L tokens, N masked positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError
from rcd_core.noise import NoiseSettings
from rcd_core.signals import ReferenceSignals
from rcd_core.training.data.chunk_noise import mask_examples
from rcd_core.training.data.examples import ChunkReader, Chunks, Limits
from rcd_core.training.data.row_order import RowOrder
from rcd_core.training.objective import IGNORED


@dataclass(frozen=True)
class Row:
    """One training row. input_ids, labels, masked (L,); p (L,) the probability each labelled token was masked with;
    signals (N masked positions) only from the cache. reason: why the example cannot be trained on; such a row keeps
    its place in the order, has no tokens and contributes nothing."""

    index: int
    example_id: str
    draw: int
    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    masked: NDArray[np.bool_]
    p: NDArray[np.float64]
    signals: ReferenceSignals | None = None
    reason: str = ""

    @classmethod
    def bad(cls, index: int, example_id: str, draw: int, reason: str, signals: ReferenceSignals | None = None) -> Row:
        none = np.zeros(0, dtype=np.int64)
        return cls(index, example_id, draw, none, none, none.astype(bool), none.astype(float), signals, reason)


class RowSource(Protocol):
    def row(self, index: int) -> Row: ...


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

    def row(self, index: int) -> Row:
        number, place, draw = self.order.locate(index)
        chunk = self._reader.chunk(number)
        example_id, reason = chunk.example_ids[place], chunk.reasons[place]
        if reason:
            if self.limits is None:
                raise UserError(f"example {example_id!r} cannot be trained on: {reason}; remove it or mend it")
            return Row.bad(index, example_id, draw, reason)
        if (number, draw) not in self._masks:
            if len(self._masks) > 1:
                self._masks.pop(next(iter(self._masks)))
            maskable = chunk.labels.values != IGNORED
            found = mask_examples(maskable, chunk.labels.offsets, chunk.example_ids, draw, self.order.noise)
            self._masks[number, draw] = found
        masked, p = self._masks[number, draw]
        input_ids, labels = (lists[place].astype(np.int64) for lists in (chunk.input_ids, chunk.labels))
        part = slice(chunk.labels.offsets[place], chunk.labels.offsets[place + 1])
        return Row(index, example_id, draw, input_ids, labels, masked[part], p[part])
