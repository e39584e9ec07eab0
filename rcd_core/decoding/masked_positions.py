"""The masked positions of a step.

Shapes: N masked positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rcd_core.decoding.chunk import Positions
from rcd_core.decoding.sequence import LiveBlock


@dataclass(frozen=True)
class MaskedPositions:
    """The masked positions that one step predicts, block by block: positions (N,) in the canvas, owner (N,) index into
    blocks, ends (one per block) where its positions end."""

    blocks: list[LiveBlock]
    positions: Positions
    owner: Positions
    ends: Positions

    @classmethod
    def of(cls, blocks: list[LiveBlock]) -> MaskedPositions:
        counts = [len(b.masked_positions) for b in blocks]
        positions = np.concatenate([np.zeros(0, dtype=np.int64), *(b.masked_positions for b in blocks)])
        return cls(blocks, positions, np.repeat(np.arange(len(blocks)), counts), np.cumsum(counts))

    def slices(self) -> list[slice]:
        """Where each block's positions lie."""
        ends = self.ends.tolist()
        return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def per_block(self, value: Callable[[LiveBlock], float]) -> NDArray[np.float64]:
        """(N,) a property of each position's block."""
        return np.array([value(b) for b in self.blocks], dtype=np.float64)[self.owner]
