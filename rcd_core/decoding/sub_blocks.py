"""Sub-blocks (DecodeSettings.sub_block_length), as in Fast-dLLM v2 (arXiv 2509.26328).

A pass sees a whole block, and commits tokens of the first of its sub-blocks that has masks. A stop token ends the
request as soon as nothing before it is masked. In a shifted model the pass over a finished block, which stores its keys
and values, predicts the first token of the next block, and nothing else: the denoising passes after it know that
token.

cache "dual": once a sub-block's first token is known, passes run that sub-block alone, over the keys and values that
the block had in its last whole pass. Residuals reach to the block's end, with this cache to the sub-block's.

Shapes: T canvas length.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rcd_core.decoding.chunk import Chunk, PassKind, Positions
from rcd_core.decoding.generation import Step
from rcd_core.decoding.sequence import LiveBlock, Sequence


def sub_blocks(masked: NDArray[np.bool_], block_length: int, length: int, shifted: bool) -> list[tuple[int, int]]:
    """[start, end) of the sub-blocks that have masks. masked (T,), of the canvas. shifted: a block's first token is one
    of its own, but for that of the canvas."""
    found: list[tuple[int, int]] = []
    for start in range(0, len(masked), length):
        end, first = min(start + length, len(masked)), start
        if shifted and start and start % block_length == 0 and masked[start]:
            found.append((start, start + 1))
            first += 1
        if masked[first:end].any():
            found.append((first, end))
    return found


@dataclass(eq=False)
class SubBlocksSequence(Sequence):
    _first: int = field(init=False)  # index of the first sub-block that was opened in the current block

    def __post_init__(self) -> None:
        super().__post_init__()
        self.wide = self.settings.residual and self.settings.cache != "dual"
        self.live = [self.open_block(0)]

    def open_block(self, index: int) -> LiveBlock:
        before = getattr(self, "_before", ())
        block = super().open_block(index)
        if index and self._begin(self.blocks[index - 1][0]) == self._begin(block.start):
            self._before = before
        else:
            self._first = index
        return block

    def restart(self) -> None:
        """Begin the whole block again: residuals pass from one sub-block to the next."""
        self.live = [LiveBlock(self, self._first, *self.blocks[self._first], self.settings)]
        super().restart()

    # -- where blocks begin and end
    def _begin(self, position: int) -> int:
        return position - position % self.settings.block_length

    @property
    def block(self) -> tuple[int, int]:
        start, end = self.live[0].start, self.live[0].end
        return self._begin(start), end

    def is_next_token(self, start: int) -> bool:
        first_of_block = start > 0 and start == self._begin(start)
        return self.model.shifted and first_of_block and bool(self.initially_masked[start])

    def visible_end(self, start: int, end: int) -> int:
        if self.is_next_token(start):
            return start
        return min(self._begin(start) + self.settings.block_length, len(self.canvas))

    def scope_end(self, start: int, end: int) -> int:
        return self.visible_end(start, end) if self.wide and not self.is_next_token(start) else end

    @property
    def widest_scope(self) -> int:
        return self.settings.block_length

    @property
    def most_reused(self) -> int:
        """A block whose last row predicts the next token has to run."""
        return max(0, super().most_reused - self.live[0].next_token)

    # -- passes
    def next_pass(self, prefill_chunk: int) -> tuple[PassKind, list[Chunk]]:
        block, b = self.live[0], self.settings.block_length
        end = block.visible_end
        if not self.stores:
            return "denoise", [self._chunk(0, end)]
        pending, most = self.block[0] - self.stored, max(b, prefill_chunk - prefill_chunk % b)
        if pending > most or (pending and block.index == 0 and not block.next_token):
            return "prefill", [self._chunk(self.stored, min(self.block[0], self.stored + most))]
        first = block.start - block.start % (self.settings.sub_block_length or b)
        if self.settings.cache == "dual" and block.step and self.canvas[first] != self.mask_token_id:
            return "denoise", [self._chunk(first, block.end, end)]
        return "denoise", [self._chunk(self.stored, end)]

    def apply_commits(
        self, block: LiveBlock, positions: Positions, tokens: Positions, still_masked: Positions, step: Step | None
    ) -> None:
        super().apply_commits(block, positions, tokens, still_masked, step)
        if self.live[0] is block and not self.finished and not self.infill and len(still_masked):
            final = self.canvas[max(self.num_prompt, block.start) : still_masked[0]]
            if not set(self.settings.stop_token_ids).isdisjoint(final.tolist()):
                block.end = int(still_masked[0])
                self.finished = self.stopped = True

    def advance(self, block: LiveBlock) -> None:
        super().advance(block)
        following = self.live[0]
        if following is block or not self.wide or block.next_token:
            return
        if self._begin(following.start) == self._begin(block.start):
            following.started, following.has_residual = block.started, block.has_residual
