"""Editing (DecodeSettings.editing_threshold), as in LLaDA2.1: a pass may replace tokens that earlier passes of the same
block committed, if it is certain enough of others. The prompt and finished blocks never change.

A block is done when a pass that began without masks replaces nothing, or after max_post_steps such passes. Residuals
belong to masked positions only: where a token stands, the input is that token.

Shapes: N positions that a step predicts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rcd_core.decoding.chunk import Positions
from rcd_core.decoding.masked_positions import MaskedPositions
from rcd_core.decoding.sequence import LiveBlock, Sequence

Bools = NDArray[np.bool_]


@dataclass(eq=False)
class EditedBlock(LiveBlock):
    edits = True
    post_steps: int = 0  # passes that began without masks
    _predicted: Positions = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._predicted = self.masked_positions

    @property
    def predicted(self) -> Positions:
        """Also positions that hold a token by now."""
        return self._predicted


@dataclass(eq=False)
class EditingSequence(Sequence):
    def open_block(self, index: int) -> LiveBlock:
        super().open_block(index)
        return EditedBlock(self, index, *self.blocks[index], self.settings)

    def _write(self, block: LiveBlock, positions: Positions, tokens: Positions, still_masked: Positions) -> None:
        assert isinstance(block, EditedBlock)
        any_edited = bool((self.canvas[positions] != self.mask_token_id).any())
        began_masked = len(block.masked_positions) > 0
        self.canvas[positions] = tokens
        block.masked_positions = block.predicted[self.canvas[block.predicted] == self.mask_token_id]
        block.step += 1
        if not began_masked and not any_edited:
            if self.stores:  # the pass saw the final tokens only
                self.stored = block.end
            self.advance(block)
        elif not len(block.masked_positions):
            if block.post_steps == self.settings.max_post_steps:
                self.advance(block)
            block.post_steps += 1


def choose_edits(masked: MaskedPositions, filled: Bools, tokens: Positions, confidence: NDArray[np.floating]) -> Bools:
    """(N,) positions whose tokens are replaced by `tokens` (N,). filled (N,): they hold a token."""
    before = np.concatenate([b.sequence.canvas[b.predicted] for b in masked.blocks])
    settings = [b.settings.editing_threshold for b in masked.blocks]
    thresholds = np.array([np.inf if threshold is None else threshold for threshold in settings])[masked.owner]
    edits: Bools = filled & (confidence > thresholds) & (tokens != before)
    return edits
