"""One request in the engine: its canvas, its blocks, and which pass it needs next.

Shapes: T canvas length, b block length.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcd_core.decode_settings import DecodeSettings
from rcd_core.decoding.feedback import feedback_of, is_greedy
from rcd_core.decoding.reference import WarmStart
from rcd_core.families.base import DiffusionModel
from rcd_core.ops.reduce import Feedback
from rcd_core.signals import Signals

PassKind = Literal["prefill", "denoise", "store"]


class Pass(NamedTuple):
    """One forward over canvas positions [start, end) that sees keys [0, num_keys). `cached`: through the slot."""

    kind: PassKind
    start: int
    end: int
    num_keys: int
    cached: bool


@dataclass
class Forwards:
    """Target passes by kind, a guidance pair being one; reference = one per warm-started block, context included."""

    prefill: int = 0
    denoise: int = 0
    store: int = 0
    reference: int = 0

    @property
    def total(self) -> int:
        """Target passes of every kind."""
        return self.prefill + self.denoise + self.store


@dataclass(frozen=True)
class Step:
    """One denoising pass, absolute positions. Aligned with masked: argmax, confidence, entropy (nats) of this pass's
    predictions; alpha, the weights used in its input."""

    masked: list[int]
    argmax: list[int]
    confidence: list[float]
    entropy: list[float]
    committed: list[int]
    alpha: list[float]


@dataclass(frozen=True)
class Generation:
    """token_ids: new tokens before the stop token and within max_new_tokens (infill: the filled tokens, in order).
    canvas_ids: prompt and every decoded block, uncut. settings: what was in effect, every default filled in.
    reference_failures: blocks that started from zero because the reference could not answer."""

    token_ids: list[int]
    canvas_ids: list[int]
    num_forwards: Forwards
    finish_reason: Literal["stop", "length", "filled"]
    settings: DecodeSettings
    steps: list[Step]
    reference_failures: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """The paper's measure: generated tokens over denoising passes."""
        return len(self.token_ids) / max(1, self.num_forwards.denoise)

    def tokens_per_pass(self, reference_cost: float) -> float:
        """Generated tokens over all passes, a reference pass counted as `reference_cost` of a target's (ratio of
        FLOPs)."""
        passes = self.num_forwards.total + reference_cost * self.num_forwards.reference
        return len(self.token_ids) / max(1.0, passes)


@dataclass(eq=False)
class Sequence:
    """The state of one request. `stored`: canvas positions [0, stored) have exact keys and values in the slot."""

    model: DiffusionModel
    settings: DecodeSettings  # resolved: nothing left to default
    canvas: NDArray[np.int64]
    num_prompt: int  # tokens before the first new one; the whole canvas for infill
    infill: bool
    blocks: list[tuple[int, int]]
    block_index: int = 0
    step: int = 0
    stored: int = 0
    slot: int = -1
    started: bool = False  # the block's start (first residual) is in place
    finished: bool = False
    stopped: bool = False
    empty_pass_due: bool = False
    fed: bool = False  # its places in the residual state are filled
    awaited: tuple[WarmStart, Future[Signals | None]] | None = None  # asked of a remote reference
    reference_failures: int = 0
    forwards: Forwards = field(default_factory=Forwards)
    steps: list[Step] = field(default_factory=list)
    block: tuple[int, int] = field(init=False)  # blocks[block_index]
    wanted: NDArray[np.bool_] = field(init=False)  # positions that were masked at the beginning
    open: NDArray[np.int64] = field(init=False)  # masked positions from the block's start to scope_end
    feedback: Feedback | None = field(init=False)  # how its own predictions become residuals
    greedy: bool = field(init=False)
    looks_at_entropy: bool = field(init=False)
    wide: bool = field(init=False)  # its residuals reach beyond the block
    _schedule: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.wanted = self.canvas == self.model.mask_token_id
        self.feedback, self.greedy = feedback_of(self.settings), is_greedy(self.settings)
        self.looks_at_entropy = self.settings.trace or self.settings.policy == "entropy_bounded"
        self.wide = self.settings.residual and self.settings.residual_scope == "all_masked"
        self._open()

    def _open(self) -> None:
        self.block = self.blocks[self.block_index]
        start = self.block[0]
        self.open = (self.canvas[start : self.scope_end] == self.model.mask_token_id).nonzero()[0] + start
        self._schedule = self._planned()

    # -- where we are
    @property
    def scope_end(self) -> int:
        """Residuals and predictions reach to here: the block's end, or the canvas' for scope all_masked."""
        return len(self.canvas) if self.wide else self.block[1]

    @property
    def widest_scope(self) -> int:
        """Positions that the residual state has to hold at most."""
        first = self.blocks[0][0]
        return len(self.canvas) - first if self.wide else max(end - start for start, end in self.blocks)

    def masked_positions(self) -> NDArray[np.int64]:
        """Of the block."""
        return self.open[self.open < self.block[1]]

    @property
    def block_done(self) -> bool:
        return not len(self.open) or self.wide and bool(self.open[0] >= self.block[1])

    def commit(self, positions: NDArray[np.int64], tokens: NDArray[np.int64], rest: NDArray[np.int64]) -> None:
        """Write tokens at some of the open positions; rest: the others."""
        self.canvas[positions] = tokens
        self.open = rest

    def quota(self) -> int:
        """Commits planned for this pass."""
        each, extra = self._schedule
        return each + (self.step < extra)

    def _planned(self) -> tuple[int, int]:
        """Commits of every pass of the block, and how many passes make one more. SDAR: the block length over the
        steps, whatever is masked (semantics.md 1.6); LLaDA: the masks present at the block's start, and one under a
        threshold (semantics.md 2.2, 3)."""
        s = self.settings
        assert s.denoising_steps is not None
        start, end = self.block
        if not self.model.blocks_from_prompt_end:
            return divmod(s.block_length or end - start, s.denoising_steps)
        if s.policy == "low_confidence_dynamic":
            return 1, 0
        return divmod(int(self.wanted[start:end].sum()), s.denoising_steps)

    # -- what comes next
    def next_pass(self, prefill_chunk: int) -> Pass:
        """prefill_chunk: prompt tokens a pass takes at most, rounded down to whole blocks but at least one."""
        start, end = self.block
        length = len(self.canvas)
        if self.model.blocks_from_prompt_end:
            if self.settings.cache == "none":
                return Pass("denoise", 0, length, length, False)
            if self.step == 0:
                return Pass("denoise", 0, length, length, True)
            return Pass("denoise", start, length if self.settings.cache == "prefix" else end, length, True)
        if self.settings.cache == "none":
            return Pass("denoise", 0, end, end, False)
        if self.block_done:  # compat_passes only: the authors store a finished block at once
            return Pass("store", start, end, end, True)
        first = self.block_index == 0
        if self.stored < start and (first or self.settings.compat_passes):
            if not self.settings.compat_passes:
                assert self.settings.block_length is not None
                b = self.settings.block_length
                start = min(start, self.stored + max(b, prefill_chunk - prefill_chunk % b))
            return Pass("prefill" if first else "store", self.stored, start, start, True)
        # Finished blocks that are not stored yet ride along with this block's first pass.
        return Pass("denoise", self.stored, end, end, cached=self.stored > 0 or start > 0)

    def advance(self) -> None:
        """Called when the current block holds no mask and nothing is due for it: on to the next block or the end."""
        self.fed, self.started, self.step = False, False, 0
        early = not self.infill and (not self.settings.compat_passes or not self.model.blocks_from_prompt_end)
        start, end = self.block
        stops = self.settings.stop_token_ids if early else None
        if stops and not set(stops).isdisjoint(self.canvas[max(self.num_prompt, start) : end].tolist()):
            self.finished = self.stopped = True
        elif self.block_index + 1 == len(self.blocks):
            self.finished = True
        else:
            self.block_index += 1
            self._open()

    # -- what came out
    def final_ids(self) -> list[int]:
        """New tokens that can no longer change: all of finished blocks, cut like the output. Infill: none before the
        end."""
        if self.finished:
            return self.output().token_ids
        if self.infill:
            return []
        new = self.canvas[self.num_prompt : max(self.num_prompt, self.block[0])][: self.settings.max_new_tokens]
        stops = np.flatnonzero(np.isin(new, self.settings.stop_token_ids or ()))
        return [int(t) for t in (new[: stops[0]] if len(stops) else new)]

    def output(self) -> Generation:
        end = self.block[1]
        canvas = (
            self.canvas if self.infill or self.model.blocks_from_prompt_end and not self.stopped else self.canvas[:end]
        )
        if self.infill:
            return self._generation(self.canvas[self.wanted], canvas, "filled")
        new = self.canvas[self.num_prompt : end][: self.settings.max_new_tokens]
        stops = np.flatnonzero(np.isin(new, self.settings.stop_token_ids or ()))
        if len(stops):
            return self._generation(new[: stops[0]], canvas, "stop")
        return self._generation(new, canvas, "length")

    def _generation(
        self, tokens: NDArray[np.int64], canvas: NDArray[np.int64], reason: Literal["stop", "length", "filled"]
    ) -> Generation:
        return Generation(
            tokens.tolist(), canvas.tolist(), self.forwards, reason, self.settings, self.steps, self.reference_failures
        )
