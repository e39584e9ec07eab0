"""The passes that the authors' code makes, for exact comparison with it (DecodeSettings.compat_passes).

They give the same tokens in more passes. SDAR: a store pass per block, and the whole prompt in one prefill. LLaDA: no
early end at a stop token. Fast-dLLM's caches: a pass that commits nothing after a block that was done in its first one.
"""

from __future__ import annotations

from dataclasses import dataclass

from rcd_core.decoding.generation import Step
from rcd_core.decoding.sequence import PassRow, Positions, Sequence


@dataclass(eq=False)
class CompatSequence(Sequence):
    empty_pass_due: bool = False

    @property
    def shares_prefix(self) -> bool:
        return False

    def next_pass(self, prefill_chunk: int) -> PassRow:
        start, end = self.block
        if self.settings.cache == "block" and self.block_done:
            return self._row("store", start, end, end)
        if self.settings.cache == "block" and self.stored < start:
            return self._row("prefill" if self.block_index == 0 else "store", self.stored, start, start)
        return super().next_pass(prefill_chunk)

    def pass_done(self, row: PassRow) -> None:
        super().pass_done(row)
        if row.kind == "store" and self.block_done:
            self.advance()

    def apply_commits(
        self, positions: Positions, tokens: Positions, still_masked: Positions, step: Step | None
    ) -> None:
        if self.empty_pass_due:
            self.empty_pass_due = False
            self.advance()
        else:
            super().apply_commits(positions, tokens, still_masked, step)

    def _block_finished(self) -> None:
        if self.settings.cache in ("prefix", "dual") and self.step == 1:
            self.empty_pass_due = True
        elif self.settings.cache != "block":  # otherwise its store pass comes next
            self.advance()

    def _holds_stop_token(self) -> bool:
        return not self.model.blocks_from_prompt_end and super()._holds_stop_token()
