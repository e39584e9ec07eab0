"""One request in the engine: its canvas, its blocks, and the pass it needs next.

Shapes: T canvas length, N masked positions, q tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcd_core.alpha import position_rule
from rcd_core.decode_settings import ResolvedSettings
from rcd_core.decoding.generation import Forwards, Generation, Step, TokenLogprobs
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.ops.reduce import Feedback

PassKind = Literal["prefill", "denoise", "store"]
Positions = NDArray[np.int64]


class PassRow(NamedTuple):
    """A request's row of a batched pass: token_ids (q,) at positions [start, start + q), which see keys [0, num_keys).

    slot: cache slot to read and write; None: no cache, the row starts at 0 and sees itself.
    residual: (slot, start, end): masked tokens at positions [start, end) take in this slot's residual state.
    """

    token_ids: Positions
    start: int
    num_keys: int
    block_length: int
    slot: int | None
    residual: tuple[int, int, int] | None = None
    kind: PassKind = "denoise"

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(eq=False)
class Sequence:
    """The state of one request. Each step of the engine calls `next_pass`, `pass_done` when that pass has run, and
    `predicted` if it was a denoising pass."""

    model: DiffusionModel
    settings: ResolvedSettings
    canvas: NDArray[np.int64]  # (T,)
    num_prompt: int  # tokens before the first new one; the whole canvas for infill
    infill: bool
    blocks: list[tuple[int, int]]  # [start, end) of the blocks that have masks
    block_index: int = 0
    step: int = 0  # denoising passes of this block so far
    stored: int = 0  # positions [0, stored) have exact keys and values in the slot
    slot: int = -1
    started: bool = False  # the block's first residual is in place
    has_residual: bool = False  # its rows of the residual state are filled
    finished: bool = False
    stopped: bool = False  # at a stop token
    error: str | None = None  # why the request failed; it is finished then
    reference_failures: int = 0
    forwards: Forwards = field(default_factory=Forwards)
    steps: list[Step] = field(default_factory=list)
    num_logprobs: int | None = None  # most probable tokens to report with each new token's logprob; None: no logprobs
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by position in the canvas
    block: tuple[int, int] = field(init=False)  # blocks[block_index]
    initially_masked: NDArray[np.bool_] = field(init=False)  # (T,)
    masked_positions: Positions = field(init=False)  # (N,) from the block's start to scope_end
    feedback: Feedback | None = field(init=False)  # how its own predictions become residuals
    needs_entropy: bool = field(init=False)
    wide: bool = field(init=False)  # residuals reach beyond the block (residual_scope "all_masked")
    _schedule: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        s = self.settings
        self.initially_masked = self.canvas == self.model.mask_token_id
        self.feedback = None
        if s.residual and s.residual_source == "self":
            self.feedback = Feedback(
                rule=position_rule(s), alpha_scale=s.alpha_scale, top_k=s.residual_top_k, **s.temperatures
            )
        self.needs_entropy = s.trace or s.policy == "entropy_bounded"
        self.wide = s.residual and s.residual_scope == "all_masked"
        self._enter_block()

    def _enter_block(self) -> None:
        self.block = self.blocks[self.block_index]
        start = self.block[0]
        self.masked_positions = np.flatnonzero(self.canvas[start : self.scope_end] == self.model.mask_token_id) + start
        self._schedule = self._planned_commits()

    @property
    def scope_end(self) -> int:
        """Residuals and predictions reach this far: the block's end, or the canvas's end for a wide scope."""
        return len(self.canvas) if self.wide else self.block[1]

    @property
    def visible_end(self) -> int:
        """How far a pass over the block sees: SDAR to the block's end, LLaDA to the canvas's end."""
        return len(self.canvas) if self.model.blocks_from_prompt_end else self.block[1]

    @property
    def widest_scope(self) -> int:
        """Most positions of the residual state that a block of this request needs."""
        first = self.blocks[0][0]
        return len(self.canvas) - first if self.wide else max(end - start for start, end in self.blocks)

    @property
    def shares_prefix(self) -> bool:
        """Whether its prompt blocks may come from another request's slot. LLaDA's caches are approximations that hold
        for their own request only."""
        return self.settings.cache == "block"

    @property
    def block_done(self) -> bool:
        masked = self.masked_positions
        return not len(masked) or self.wide and bool(masked[0] >= self.block[1])

    @property
    def is_start_pass(self) -> bool:
        """Start "self": the block's first pass commits nothing, it only supplies the first residual."""
        return self.settings.residual and not self.started

    def quota(self) -> int:
        """Commits planned for this pass."""
        each, extra = self._schedule
        return each + (self.step < extra)

    def _planned_commits(self) -> tuple[int, int]:
        """(commits of every pass of the block, passes that commit one more). SDAR divides the block length by the
        steps; LLaDA divides the masks at the block's start, and Fast-dLLM plans one commit under a threshold."""
        s = self.settings
        if not self.model.blocks_from_prompt_end:
            return divmod(s.block_length, s.denoising_steps)
        if s.policy == "low_confidence_dynamic":
            return 1, 0
        start, end = self.block
        return divmod(int(self.initially_masked[start:end].sum()), s.denoising_steps)

    # -- passes
    def next_pass(self, prefill_chunk: int) -> PassRow:
        """prefill_chunk: most prompt tokens in one pass, rounded down to whole blocks but at least one block."""
        start, end = self.block
        length, cache = len(self.canvas), self.settings.cache
        if self.model.blocks_from_prompt_end:
            if cache == "none" or self.step == 0:
                return self._row("denoise", 0, length, length, cached=cache != "none")
            return self._row("denoise", start, length if cache == "prefix" else end, length)
        if cache == "none":
            return self._row("denoise", 0, end, end, cached=False)
        if self.block_index == 0 and self.stored < start:
            b = self.settings.block_length
            chunk_end = min(start, self.stored + max(b, prefill_chunk - prefill_chunk % b))
            return self._row("prefill", self.stored, chunk_end, chunk_end)
        # Finished blocks that are not stored yet join this block's first pass, which saves a store pass per block.
        return self._row("denoise", self.stored, end, end, cached=start > 0)

    def _row(self, kind: PassKind, start: int, end: int, num_keys: int, cached: bool = True) -> PassRow:
        takes_residual = kind == "denoise" and self.has_residual
        return PassRow(
            token_ids=self.canvas[start:end],
            start=start,
            num_keys=num_keys,
            block_length=self.settings.block_length,
            slot=self.slot if cached else None,
            residual=(self.slot, self.block[0], self.scope_end) if takes_residual else None,
            kind=kind,
        )

    def pass_done(self, row: PassRow) -> None:
        """Count a pass, and note what it stored in the slot. LLaDA's caches never hold exact keys and values."""
        setattr(self.forwards, row.kind, getattr(self.forwards, row.kind) + 1)
        if row.kind != "denoise":
            self.stored = row.end
        elif row.slot is not None and self.settings.cache == "block":
            self.stored = self.block[0]

    def apply_commits(
        self, positions: Positions, tokens: Positions, still_masked: Positions, step: Step | None
    ) -> None:
        """After a denoising pass: write `tokens` at `positions`, and go on to the next block if this one is done."""
        if self.feedback is not None:
            self.has_residual = True
        if self.is_start_pass:
            self.started = True
            return
        if step is not None:
            self.steps.append(step)
        self.canvas[positions] = tokens
        self.masked_positions = still_masked
        self.step += 1
        if self.block_done:
            self._block_finished()

    def _block_finished(self) -> None:
        self.advance()

    def advance(self) -> None:
        """Go on from a finished block to the next one, or finish the request."""
        self.has_residual, self.started, self.step = False, False, 0
        if self._holds_stop_token():
            self.finished = self.stopped = True
        elif self.block_index + 1 == len(self.blocks):
            self.finished = True
        else:
            self.block_index += 1
            self._enter_block()

    def _holds_stop_token(self) -> bool:
        start, end = self.block
        new = self.canvas[max(self.num_prompt, start) : end]
        return not self.infill and not set(self.settings.stop_token_ids).isdisjoint(new.tolist())

    def fail(self, error: str) -> None:
        self.finished, self.error = True, error

    # -- results
    def final_ids(self) -> list[int]:
        """New tokens that can no longer change, cut like the output. Infill: none before the end."""
        if self.finished:
            return self.output().token_ids
        return [] if self.infill else self._new_tokens(max(self.num_prompt, self.block[0]))[0]

    def _new_tokens(self, end: int) -> tuple[list[int], bool]:
        """(new tokens before `end`, cut at the first stop token and at max_new_tokens; whether there was a stop)."""
        new: list[int] = self.canvas[self.num_prompt : end][: self.settings.max_new_tokens].tolist()
        stop = next((i for i, token in enumerate(new) if token in self.settings.stop_token_ids), None)
        return new[:stop], stop is not None

    def logprobs_of(self, first: int, last: int) -> list[TokenLogprobs | None]:
        """Of the new tokens [first, last), if they were requested. None: another engine committed the token."""
        if self.num_logprobs is None:
            return []
        return [self.logprobs.get(self.num_prompt + i) for i in range(first, last)]

    def output(self) -> Generation:
        end = self.block[1]
        reason: Literal["stop", "length", "filled"] = "filled"
        if self.infill:
            tokens = self.canvas[self.initially_masked].tolist()
        else:
            tokens, stopped = self._new_tokens(end)
            reason = "stop" if stopped else "length"
        whole = self.infill or self.model.blocks_from_prompt_end and not self.stopped
        canvas = (self.canvas if whole else self.canvas[:end]).tolist()
        return Generation(tokens, canvas, self.forwards, reason, self.settings, self.steps, self.reference_failures)


def check_failures(sequences: Iterable[Sequence]) -> None:
    """Raise UserError if requests have failed. Called when the others are finished."""
    errors = [s.error for s in sequences if s.error is not None]
    if errors:
        raise UserError(f"{len(errors)} requests failed; the first one: {errors[0]}")


@dataclass(frozen=True)
class MaskedPositions:
    """The masked positions that one step predicts, request by request: positions (N,) in the canvas, owner (N,) index
    into sequences, ends (one per request) where its positions end."""

    sequences: list[Sequence]
    positions: Positions
    owner: Positions
    ends: Positions

    @classmethod
    def of(cls, sequences: list[Sequence]) -> MaskedPositions:
        counts = [len(s.masked_positions) for s in sequences]
        positions = np.concatenate([np.zeros(0, dtype=np.int64), *(s.masked_positions for s in sequences)])
        return cls(sequences, positions, np.repeat(np.arange(len(sequences)), counts), np.cumsum(counts))

    def slices(self) -> list[slice]:
        """Where each request's positions lie."""
        ends = self.ends.tolist()
        return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def per_request(self, value: Callable[[Sequence], float]) -> NDArray[np.float64]:
        """(N,) a property of each position's request."""
        return np.array([value(s) for s in self.sequences], dtype=np.float64)[self.owner]
