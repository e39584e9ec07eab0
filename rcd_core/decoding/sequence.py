"""One request in the engine: its canvas, its live blocks, and the rows of the pass it needs next.

Shapes: T canvas length, N masked positions, q tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rcd_core.alpha import position_rule
from rcd_core.decode_settings import RankBy, ResolvedSettings
from rcd_core.decoding.chunk import Chunk, PassKind, Positions
from rcd_core.decoding.generation import Forwards, Generation, Step, TokenLogprobs
from rcd_core.decoding.policies import POLICIES, planned_commits, planned_share
from rcd_core.families.base import DiffusionModel
from rcd_core.ops.reduce import Feedback

# threshold, inclusive, entropy bound, policy, rank_by: as Sequence.commit_rule
SEQUENTIAL: tuple[float, ...] = (0.0, 0.0, 0.0, list(POLICIES).index("sequential"), 0)


@dataclass(eq=False)
class LiveBlock:
    """A block in the course of denoising."""

    edits: ClassVar[bool] = False  # whether passes replace its tokens (editing.py)
    sequence: Sequence
    index: int  # in sequence.blocks
    start: int
    end: int
    settings: ResolvedSettings
    step: int = 0  # denoising passes so far
    started: bool = False  # its first residual is in place
    has_residual: bool = False  # its part of the residual state is filled
    activated: bool = True  # False: it commits what is certain enough, possibly nothing (live_blocks.py)
    masked_positions: Positions = field(init=False)  # (N,) from the block's start to scope_end
    numbers: tuple[float, ...] = field(init=False)  # start, end, and the commit rule of this pass
    # A shifted model with a cache of slices: no later pass predicts the block's first token, so the first pass commits
    # it, and no other (Fast-dLLM on Dream).
    first_alone: bool = field(init=False)
    next_token: bool = field(init=False)  # one token that the last row of the block before predicts (sub_blocks.py)
    _plan: list[int] = field(init=False)

    def __post_init__(self) -> None:
        s = self.sequence
        part = s.canvas[self.start : self.scope_end]
        self.masked_positions = (part == s.mask_token_id).nonzero()[0] + self.start
        self.first_alone = s.model.shifted and s.model.whole_canvas and self.settings.cache in ("prefix", "dual")
        self.next_token = s.is_next_token(self.start)
        masked = int(s.initially_masked[self.start : self.end].sum()) if s.model.blocks_from_prompt_end else None
        self._plan = planned_commits(self.settings, masked, self.first_alone)
        self.numbers = (self.start, self.end, *(SEQUENTIAL if self.first_alone or self.next_token else s.commit_rule))

    @property
    def predicted(self) -> Positions:
        """The positions that a pass predicts."""
        return self.masked_positions

    @property
    def scope_end(self) -> int:
        """Residuals and predictions reach this far."""
        return self.sequence.scope_end(self.start, self.end)

    @property
    def visible_end(self) -> int:
        """How far a pass over the block sees."""
        return self.sequence.visible_end(self.start, self.end)

    @property
    def done(self) -> bool:
        masked = self.masked_positions
        return not len(masked) or self.sequence.wide and bool(masked[0] >= self.end)

    @property
    def is_start_pass(self) -> bool:
        """Start "self": the block's first pass commits nothing, it only supplies the first residual."""
        return self.settings.residual and not self.started and not self.next_token

    @property
    def must_commit(self) -> bool:
        """Whether a pass that commits nothing of this block is a fault."""
        if self.settings.policy == "independent" and self.share() < 1.0:
            return False
        return bool(self.quota()) and not (self.is_start_pass or self.done)

    def quota(self) -> int:
        """Commits planned for this pass; none before the block is activated."""
        if not self.activated:
            return 0
        return self._plan[self.step] if self.step < len(self._plan) else self._plan[-1]

    def share(self) -> float:
        """Of the masks, what this pass commits by the policy "independent"."""
        return planned_share(self.step, self.settings.denoising_steps, self.settings.schedule == "time")


@dataclass(eq=False)
class Sequence:
    """The state of one request. A step calls `next_pass`, `pass_done` and, if it denoised, `apply_commits` a block."""

    model: DiffusionModel
    settings: ResolvedSettings
    canvas: NDArray[np.int64]  # (T,)
    num_prompt: int  # tokens before the first new one; the whole canvas for infill
    infill: bool
    blocks: list[tuple[int, int]]  # [start, end) of the blocks that have masks
    stored: int = 0  # positions [0, stored) have exact keys and values in the pages
    slot: int = -1
    kind: int = -1  # how its positions are predicted (Sampler.kind_of)
    pages: list[int] = field(default_factory=list)  # of positions [0, len(pages) x page size)
    finished: bool = False
    stopped: bool = False  # at a stop token
    error: str | None = None  # why the request failed; it is finished then
    reference_failures: int = 0
    forwards: Forwards = field(default_factory=Forwards)
    steps: list[Step] = field(default_factory=list)
    num_logprobs: int | None = None  # most probable tokens to report with each new token's logprob; None: no logprobs
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by position in the canvas
    num_candidates: int = 0  # most probable tokens of each predicted position in the trace
    live: list[LiveBlock] = field(init=False)  # in order; the last one is kept when the request is finished
    mask_token_id: int = field(init=False)
    initially_masked: NDArray[np.bool_] = field(init=False)  # (T,)
    feedback: Feedback | None = field(init=False)  # how its own predictions become residuals
    loopholing: bool = field(init=False)  # instead, the states of its last pass
    needs_entropy: bool = field(init=False)
    commit_rule: tuple[float, ...] = field(init=False)  # threshold, inclusive, entropy bound, policy, rank_by
    grid: int = field(init=False)  # below the block length: a block begins here, and at every block length behind it
    wide: bool = field(init=False)  # residuals reach beyond the block (residual_scope "all_masked")
    _before: tuple[int, ...] = field(init=False)  # forwards and steps when the last block was opened

    def __post_init__(self) -> None:
        s = self.settings
        self.mask_token_id = self.model.mask_token_id
        self.initially_masked = self.canvas == self.mask_token_id
        self.feedback, self.loopholing = None, s.residual and self.model.loophole is not None
        if s.residual and s.residual_source == "self" and not self.loopholing:
            self.feedback = Feedback(
                rule=position_rule(s), alpha_scale=s.alpha_scale, top_k=s.residual_top_k, **s.temperatures
            )
        self.needs_entropy = s.trace or s.policy == "entropy_bounded" or s.rank_by == "entropy"
        self.grid = 0
        if self.model.blocks_from_prompt_end and not self.model.whole_canvas:
            self.grid = self.blocks[0][0] % s.block_length
        self.wide = s.residual and s.residual_scope == "all_masked"
        self.commit_rule = (
            *(s.confidence_threshold, float(self.threshold_inclusive), s.entropy_bound or 0.0),
            *(list(POLICIES).index(s.policy), get_args(RankBy).index(s.rank_by)),
        )
        self.live = [self.open_block(0)]

    def open_block(self, index: int) -> LiveBlock:
        f = self.forwards
        self._before = f.prefill, f.denoise, f.store, f.reference, len(self.steps)
        return LiveBlock(self, index, *self.blocks[index], self.settings)

    @property
    def block(self) -> tuple[int, int]:
        """[start, end) of the first live block. All positions before it are final."""
        return self.live[0].start, self.live[0].end

    @property
    def block_index(self) -> int:
        return self.live[0].index

    @property
    def block_causal(self) -> bool:
        """A token sees no later block (SDAR), or all of the canvas (LLaDA)."""
        return not self.model.whole_canvas

    @property
    def threshold_inclusive(self) -> bool:
        return self.model.threshold_inclusive

    def scope_end(self, start: int, end: int) -> int:
        """Residuals and predictions of the block [start, end) reach this far: its end, or the canvas's end for a wide
        scope."""
        return len(self.canvas) if self.wide else end

    def visible_end(self, start: int, end: int) -> int:
        """How far a pass over the block sees: to its end, or to the canvas's end (LLaDA)."""
        return end if self.block_causal else len(self.canvas)

    def is_next_token(self, start: int) -> bool:
        """Whether the block at `start` is a single token that the pass over the block before it predicts."""
        return False

    @property
    def stores(self) -> bool:
        """Whether finished blocks are kept exactly in the pages. LLaDA's caches are never exact."""
        return self.block_causal and self.settings.cache != "none"

    @property
    def most_reused(self) -> int:
        """Tokens that may come from other requests' pages."""
        return self.block[0] if self.shares_prefix else 0

    @property
    def widest_scope(self) -> int:
        """Most positions of the residual state that this request needs at once."""
        first = self.blocks[0][0]
        if self.loopholing and not self.block_causal:
            return len(self.canvas)
        return len(self.canvas) - first if self.wide else max(end - start for start, end in self.blocks)

    @property
    def residual_span(self) -> tuple[int, int]:
        """[start, end) of the positions that the residual state holds: of the live blocks; with Loopholing all that a
        pass computes again."""
        if self.loopholing and not self.block_causal:
            return 0, len(self.canvas)
        return self.live[0].start, self.live[-1].scope_end

    @property
    def shares_prefix(self) -> bool:
        """Whether it may use pages of other requests and they its pages. LLaDA's caches are approximations that hold
        for their own request only."""
        return self.stores and not self.grid

    @property
    def num_masked(self) -> int:
        """Positions that a denoising pass predicts."""
        return sum([len(block.predicted) for block in self.live])

    def restart(self) -> None:
        """Begin the first live block again, with nothing stored, as if no other had been opened."""
        block = self.live[0]
        rest = slice(block.start, None)
        self.canvas[rest] = np.where(self.initially_masked[rest], self.model.mask_token_id, self.canvas[rest])
        *forwards, num_steps = self._before
        self.stored, self.forwards, self.steps = 0, Forwards(*forwards), self.steps[:num_steps]
        self.live = [self.open_block(block.index)]

    # -- passes
    def num_prefills(self, pending: int, prefill_chunk: int) -> int:
        """Prefill passes for so many tokens of the prompt."""
        return -(-pending // max(1, prefill_chunk))

    def next_pass(self, prefill_chunk: int) -> tuple[PassKind, list[Chunk]]:
        """prefill_chunk: most prompt tokens in one pass, rounded down to whole blocks but at least one block."""
        block, cache = self.live[0], self.settings.cache
        if not self.block_causal:
            length = len(self.canvas)
            first = 0 if cache == "none" or block.step == 0 else block.start
            last = block.end if first and cache == "dual" else length
            return "denoise", [self._chunk(first, last, length)]
        if cache == "none":
            return "denoise", [self._chunk(0, block.end)]
        pending, b = block.start - self.stored, self.settings.block_length
        if pending and (block.index == 0 or pending > max(b, prefill_chunk)):
            stop = self.stored + max(b, prefill_chunk - prefill_chunk % b)
            stop = min(block.start, stop - (stop - self.grid) % b)
            return "prefill", [self._chunk(self.stored, stop)]
        # Finished blocks that are not stored yet join this block's first pass, which saves a store pass per block.
        return "denoise", [self._chunk(self.stored, block.end)]

    def _chunk(self, start: int, end: int, num_keys: int = 0) -> Chunk:
        """num_keys 0: each block sees up to its own end."""
        block = self.live[0]
        causal = self.settings.block_length if not num_keys else None
        span = self.residual_span if self.loopholing else (block.start, block.scope_end)
        residual, keeps = span if block.has_residual else None, span if self.loopholing else None
        return Chunk(self.canvas[start:end], start, num_keys or end, causal, residual, self.grid, keeps)

    def pass_done(self, kind: PassKind, end: int) -> None:
        """Count a pass over tokens before `end`, and note what it stored."""
        if kind == "denoise":
            self.forwards.denoise += 1
            end = self.block[0]
        elif kind == "prefill":
            self.forwards.prefill += 1
        else:
            self.forwards.store += 1
        if self.stores:
            self.stored = end

    def apply_commits(
        self, block: LiveBlock, positions: Positions, tokens: Positions, still_masked: Positions, step: Step | None
    ) -> None:
        """After a denoising pass: write `tokens` at `positions`, and go on to the next block if this one is done."""
        block.has_residual |= self.feedback is not None or self.loopholing
        if block.is_start_pass:
            block.started = True
            return
        if step is not None:
            self.steps.append(step)
        self._write(block, positions, tokens, still_masked)

    def _write(self, block: LiveBlock, positions: Positions, tokens: Positions, still_masked: Positions) -> None:
        if len(positions):
            self.canvas[positions] = tokens
            block.masked_positions = still_masked
        block.step += 1
        if block.first_alone:
            block.numbers = (block.start, block.end, *self.commit_rule)
        if not len(still_masked) or block.done:
            self._block_finished(block)

    def _block_finished(self, block: LiveBlock) -> None:
        self.advance(block)

    def advance(self, block: LiveBlock) -> None:
        """Go on from a finished block to the next one, or finish the request."""
        if self._holds_stop_token(block):
            self.finished = self.stopped = True
        elif block.index + 1 == len(self.blocks):
            self.finished = True
        else:
            self.live = [self.open_block(block.index + 1)]

    def _holds_stop_token(self, block: LiveBlock) -> bool:
        new = self.canvas[max(self.num_prompt, block.start) : block.end]
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
        end = self.live[-1].end
        reason: Literal["stop", "length", "filled"] = "filled"
        if self.infill:
            tokens = self.canvas[self.initially_masked].tolist()
        else:
            tokens, stopped = self._new_tokens(end)
            reason = "stop" if stopped else "length"
        whole = self.infill or self.model.blocks_from_prompt_end and not self.stopped
        canvas = (self.canvas if whole else self.canvas[:end]).tolist()
        return Generation(tokens, canvas, self.forwards, reason, self.settings, self.steps, self.reference_failures)
