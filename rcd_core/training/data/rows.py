"""Training rows and their order: which example, under which draw of noise, is row g of a run.

Epoch e = g // N uses draw e mod draws. Each draw shuffles the chunks of examples and the examples inside each chunk by
sorting hashes. So row g is a pure function of (noise seed, draw, g): any worker can compute any row, nothing is saved
for a resume, and reading in order touches one chunk after another whatever the size of the data. ExampleSource
(examples.py) and SignalSource (signal_cache.py) share this order, so a baseline trained on examples sees the same
tokens and masks as the target. Examples of different chunks are not mixed: the files must not be sorted by content.
`prepare` sorts them by content hash.

Shapes: L tokens of a row, N examples, C chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError
from rcd_core.noise import NoiseSettings, hash_key, splitmix64
from rcd_core.signals import ReferenceSignals

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class TrainingRow:
    """input_ids, labels, masked (L,); p (L,) the probability each token was masked with; signals (N masked positions)
    if cached. reason: why the example cannot be trained on. Such a row has no tokens and contributes nothing; it only
    keeps its place in the order."""

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
    def rejected(
        cls, index: int, example_id: str, draw: int, reason: str, signals: ReferenceSignals | None = None
    ) -> TrainingRow:
        none = np.zeros(0, dtype=np.int64)
        return cls(index, example_id, draw, none, none, none.astype(bool), none.astype(float), signals, reason)


class RowSource(Protocol):
    def row(self, index: int) -> TrainingRow:
        """Row `index` of the run, from 0 on without end."""


class RowOrder:
    """chunk_rows (C,): examples in each chunk, in the order of the files. UserError if there are none."""

    def __init__(self, chunk_rows: Sequence[int] | Integers, noise: NoiseSettings) -> None:
        self.chunk_rows: Integers = np.asarray(chunk_rows, dtype=np.int64)
        self.noise = noise
        self.num_examples = int(self.chunk_rows.sum())
        if not self.num_examples:
            raise UserError("there are no training examples; look at what the stage `prepare` rejected")
        self._draw: tuple[int, Integers, Integers] | None = None
        self._current = range(0), 0, 0, np.zeros(0, dtype=np.int64)

    def chunks(self, draw: int) -> tuple[Integers, Integers]:
        """((C,) chunks in the order of a draw, (C + 1,) place in the epoch at which each of them starts)."""
        if self._draw is None or self._draw[0] != draw:
            order = _shuffled(len(self.chunk_rows), hash_key("chunks", self.noise.seed, draw))
            self._draw = (draw, order, np.concatenate([[0], np.cumsum(self.chunk_rows[order])]))
        return self._draw[1:]

    def locate(self, index: int) -> tuple[int, int, int]:
        """(chunk, example in the chunk, draw) of row `index`."""
        rows, chunk, draw, order_in_chunk = self._current
        if index not in rows:  # the next row is mostly in the same chunk
            epoch, place = divmod(index, self.num_examples)
            draw = epoch % self.noise.draws
            order, starts = self.chunks(draw)
            nth = int(np.searchsorted(starts, place, side="right")) - 1
            chunk, first = int(order[nth]), index - place + int(starts[nth])
            rows = range(first, first + int(self.chunk_rows[chunk]))
            order_in_chunk = _shuffled(len(rows), hash_key("examples", self.noise.seed, draw, chunk))
            self._current = rows, chunk, draw, order_in_chunk
        return chunk, int(order_in_chunk[index - rows.start]), draw


def _shuffled(count: int, key: int) -> Integers:
    return np.argsort(splitmix64(np.arange(count, dtype=np.uint64) ^ np.uint64(key)), kind="stable")
