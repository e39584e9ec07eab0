"""The positions that a step predicts: the masked ones, and where requests edit, those that hold a token.

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
    """Block by block: positions (N,) in the canvas, owner (N,) index into blocks, ends (one per block) where its
    positions end, filled (N,) whether a position holds a token, None if none does."""

    blocks: list[LiveBlock]
    positions: Positions
    owner: Positions
    ends: Positions
    filled: NDArray[np.bool_] | None = None

    @classmethod
    def of(cls, blocks: list[LiveBlock], masked_only: bool = False) -> MaskedPositions:
        """masked_only: without those that hold a token."""
        parts = [b.masked_positions if masked_only else b.predicted for b in blocks]
        counts = [len(part) for part in parts]
        positions = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
        filled = None
        if not masked_only and any([b.edits for b in blocks]):
            filled = np.concatenate([b.sequence.canvas[b.predicted] != b.sequence.mask_token_id for b in blocks])
        return cls(blocks, positions, np.repeat(np.arange(len(blocks)), counts), np.cumsum(counts), filled)

    def slices(self) -> list[slice]:
        """Where each block's positions lie."""
        ends = self.ends.tolist()
        return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def per_block(self, value: Callable[[LiveBlock], float]) -> NDArray[np.float64]:
        """(N,) a property of each position's block."""
        return np.array([value(b) for b in self.blocks], dtype=np.float64)[self.owner]
