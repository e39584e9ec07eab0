"""The passes that the authors' code makes, for exact comparison with it (DecodeSettings.compat_passes).

They give the same tokens in more passes. SDAR: a store pass per block, and the whole prompt in one prefill. LLaDA: no
early end at a stop token. Fast-dLLM's caches: a pass that commits nothing after a block that was done in its first one.
"""

from __future__ import annotations

from dataclasses import dataclass

from rcd_core.decoding.chunk import Chunk, PassKind, Positions
from rcd_core.decoding.generation import Step
from rcd_core.decoding.sequence import LiveBlock, Sequence


@dataclass(eq=False)
class CompatSequence(Sequence):
    empty_pass_due: bool = False

    @property
    def shares_prefix(self) -> bool:
        return False

    def restart(self) -> None:
        self.empty_pass_due = False
        super().restart()

    def next_pass(self, prefill_chunk: int) -> tuple[PassKind, list[Chunk]]:
        start, end = self.block
        if self.settings.cache == "block" and self.live[0].done:
            return "store", [self._chunk(start, end)]
        if self.settings.cache == "block" and self.stored < start:
            return "prefill" if self.block_index == 0 else "store", [self._chunk(self.stored, start)]
        return super().next_pass(prefill_chunk)

    def pass_done(self, kind: PassKind, end: int) -> None:
        super().pass_done(kind, end)
        if kind == "store" and self.live[0].done:
            self.advance(self.live[0])

    def apply_commits(
        self, block: LiveBlock, positions: Positions, tokens: Positions, still_masked: Positions, step: Step | None
    ) -> None:
        if self.empty_pass_due:
            self.empty_pass_due = False
            self.advance(block)
        else:
            super().apply_commits(block, positions, tokens, still_masked, step)

    def _block_finished(self, block: LiveBlock) -> None:
        if self.settings.cache in ("prefix", "dual") and block.step == 1:
            self.empty_pass_due = True
        elif self.settings.cache != "block":  # otherwise its store pass comes next
            self.advance(block)

    def _holds_stop_token(self, block: LiveBlock) -> bool:
        return not self.model.blocks_from_prompt_end and super()._holds_stop_token(block)
