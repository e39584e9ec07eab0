"""Several live blocks of one request (DecodeSettings.max_live_blocks), as in D2F (Discrete Diffusion Forcing, arXiv
2508.09192).

A block is added once the one before it is decoded to block_add_threshold. It commits only what is above its policy's
bound until the one before it is decoded to decoded_token_threshold; then it is activated, and commits at least one
token a pass as usual. Every pass runs all live blocks, and the finished blocks before them that are not stored yet;
blocks are final in order. Attention is block-causal behind the prompt, in LLaDA too, so the cache is exact.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from itertools import pairwise

from rcd_core.decoding.chunk import Chunk, PassKind, Positions
from rcd_core.decoding.generation import Step
from rcd_core.decoding.sequence import LiveBlock, Sequence


@dataclass(eq=False)
class LiveBlocksSequence(Sequence):
    """compat_passes: the other live blocks are decoded to their end after a stop token, as the authors' code does."""

    _alone: LiveBlock = field(init=False)  # the last block that was opened when no other was live
    _stop_seen: bool = False  # a stop token was committed, maybe in a block that is not final

    def __post_init__(self) -> None:
        super().__post_init__()
        self._alone = self.live[0]

    @property
    def block_causal(self) -> bool:
        return True

    @property
    def threshold_inclusive(self) -> bool:
        return False

    @property
    def shares_prefix(self) -> bool:
        """LLaDA's prompt sees all of itself, so none of it can be taken from another prompt."""
        return super().shares_prefix and not self.model.blocks_from_prompt_end

    @property
    def span(self) -> int:
        """Most positions from the start of the first live block to the end of the last one."""
        return (self.settings.max_live_blocks or 1) * self.settings.block_length

    @property
    def widest_scope(self) -> int:
        return min(self.span, len(self.canvas))

    def restart(self) -> None:
        """Begin again where a block was last opened alone: a later block depends on how far those before it were."""
        self.live, self._stop_seen = [self._alone], False
        super().restart()

    # -- passes
    def num_prefills(self, pending: int, prefill_chunk: int) -> int:
        return max(0, super().num_prefills(pending, prefill_chunk) - 1)

    def next_pass(self, prefill_chunk: int) -> tuple[PassKind, list[Chunk]]:
        """The prompt shares the first pass if it is short. LLaDA's always does, because all of it sees all of it."""
        most = max(self.settings.block_length, prefill_chunk)
        if self.shares_prefix and self.block[0] - self.stored > most:
            return super().next_pass(prefill_chunk)
        chunks, at = [], self.stored
        for block in self.live:
            chunks += self._without_masks(at, block.start)
            residual = (block.start, block.end) if block.has_residual else None
            chunks.append(Chunk(self.canvas[block.start : block.end], block.start, block.end, None, residual))
            at = block.end
        return "denoise", chunks

    def _without_masks(self, start: int, end: int) -> list[Chunk]:
        """The prompt, and blocks that hold no mask, in [start, end)."""
        b, origin = self.settings.block_length, self.blocks[0][0] if self.infill else self.num_prompt
        if not self.model.blocks_from_prompt_end:
            return [Chunk(self.canvas[start:end], start, end, b)] if start < end else []
        edges = [start, *(edge for edge in range(origin, end, b) if edge > start), end]
        return [Chunk(self.canvas[i:j], i, j, None) for i, j in pairwise(edges) if i < j]

    def apply_commits(
        self, block: LiveBlock, positions: Positions, tokens: Positions, still_masked: Positions, step: Step | None
    ) -> None:
        last = block is self.live[-1]
        if step is not None and block is not self.live[0] and not block.is_start_pass:  # one Step for the whole pass
            step = Step(*map(operator.add, vars(self.steps.pop()).values(), vars(step).values()))
        if not self.infill and not block.is_start_pass:
            self._stop_seen |= not set(self.settings.stop_token_ids).isdisjoint(tokens.tolist())
        super().apply_commits(block, positions, tokens, still_masked, step)
        if last:
            self._pass_applied()

    def _block_finished(self, block: LiveBlock) -> None:
        pass  # it stays live until those before it are finished

    def _pass_applied(self) -> None:
        """Finished blocks leave from the front, one is added, and others are activated. Shares are of whole blocks:
        tokens that were given count as decoded."""
        s, first, last = self.settings, self.live[0], self.live[-1]
        stopped = False
        while self.live and self.live[0].done and not stopped:
            first = self.live.pop(0)
            stopped = not s.compat_passes and self._holds_stop_token(first)
        ended = self._stop_seen or last.index + 1 == len(self.blocks)
        if stopped or not self.live and ended:
            self.live = [first]
            self.finished, self.stopped = True, self._stop_seen
        elif not self.live:
            self.live = [self.open_block(last.index + 1)]
            self._alone = self.live[0]
        elif not ended and _share(last) >= s.block_add_threshold:
            start, end = self.blocks[last.index + 1]
            if end - self.live[0].start <= self.span:
                self.live.append(LiveBlock(self, last.index + 1, start, end, s, activated=False))
        self.live[0].activated = True
        for block, following in pairwise(self.live):
            following.activated |= _share(block) >= s.decoded_token_threshold


def _share(block: LiveBlock) -> float:
    """Decoded share of a block."""
    length = block.end - block.start
    return (length - len(block.masked_positions)) / length
