"""The reference model in decoding: one pass over the masks of a block, which gives the signals of its first residual.

A local model and a remote replica have the same interface.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from rcd_core.decoding.cache import Slots
from rcd_core.decoding.model_runner import BatchedForward, group_rows
from rcd_core.decoding.sequence import PassRow, Positions, Sequence
from rcd_core.families.base import DiffusionModel
from rcd_core.precision import at_least_fp32
from rcd_core.signals import DenseSignals, ReferenceSignals, Signals


@dataclass(frozen=True)
class WarmStart:
    """A request to a reference. canvas_ids: all that it may see, with masks (SDAR: up to the block's end; LLaDA: the
    whole canvas). positions: masked positions to predict, absolute and ascending. top_k None: whole distributions, for
    local references only. session: the same for all blocks of an answer, to route them to one replica's cache."""

    canvas_ids: tuple[int, ...]
    positions: tuple[int, ...]
    block_length: int
    top_k: int | None = None
    alpha_temperature: float = 1.0
    delta_temperature: float = 1.0
    session: int = 0

    @classmethod
    def of(
        cls, s: Sequence, positions: Positions, top_k: int | None = None, session: int = 0, **temperatures: float
    ) -> WarmStart:
        """positions (N,), predicted from the canvas as it is now."""
        return cls(
            canvas_ids=tuple(s.canvas[: s.visible_end].tolist()),
            positions=tuple(positions.tolist()),
            block_length=s.settings.block_length,
            top_k=top_k,
            session=session,
            **temperatures,
        )

    @property
    def context_length(self) -> int:
        """Tokens before the block, all given or committed."""
        return self.positions[0] // self.block_length * self.block_length


class Reference(Protocol):
    """A reference that blocks until it has answered: one result per request, in order. None: it could not answer, and
    the block starts from zero."""

    def signals(self, requests: Many[WarmStart]) -> Many[Signals | None]: ...


@runtime_checkable
class AsyncReference(Protocol):
    """A reference elsewhere. Other requests continue while it works."""

    def submit(self, requests: Many[WarmStart]) -> Many[Future[Signals | None]]: ...


class LocalReference:
    """A reference model in this process. SDAR's contexts stay in the cache from block to block and are found by their
    tokens. cache_slots: contexts that are kept, then the least recently used is dropped. max_length: positions of a
    slot; a longer canvas enlarges them, which empties the cache."""

    def __init__(self, model: DiffusionModel, cache_slots: int = 64, max_length: int = 0) -> None:
        self.model = model
        self.cache_slots = cache_slots
        self.reused_tokens = 0  # context tokens that were in the cache
        self._forward = BatchedForward(model, cache_slots, max_length)
        self._slots = Slots(cache_slots)

    @torch.inference_mode()
    def signals(self, requests: Many[WarmStart]) -> list[Signals]:
        """One Signals per request, rows in the order of its positions."""
        if requests and self._forward.reserve(max(len(r.canvas_ids) for r in requests)):
            self._slots = Slots(self.cache_slots)
        signals: list[Signals] = []
        for start in range(0, len(requests), self.cache_slots):
            signals += self._batch(requests[start : start + self.cache_slots])
        return signals

    def _batch(self, requests: Many[WarmStart]) -> list[Signals]:
        rows = [self._row(r) for r in requests]
        hidden: dict[int, torch.Tensor] = {}
        for group in group_rows(rows, self._forward.spare_tokens):
            states = self._forward.hidden([rows[i] for i in group])
            for row, i in enumerate(group):
                at = np.asarray(requests[i].positions) - rows[i].start
                hidden[i] = states[row, torch.from_numpy(at).to(states.device)]
        for request, pass_row in zip(requests, rows, strict=True):
            if pass_row.slot is not None:
                self._slots.prefixes[pass_row.slot].stored = request.context_length
                self._slots.release(pass_row.slot)
        return self._reduce(requests, hidden)

    def _row(self, request: WarmStart) -> PassRow:
        canvas = np.asarray(request.canvas_ids, dtype=np.int64)
        if self.model.attention_block(request.block_length) is None:
            return PassRow(canvas, 0, len(canvas), request.block_length, None)
        slot, source, reused = self._slots.take(canvas, request.block_length, request.context_length)
        self.reused_tokens += reused
        if reused and source != slot:
            self._forward.cache.copy(source, slot, reused)
        return PassRow(canvas[reused:], reused, len(canvas), request.block_length, slot)

    def _reduce(self, requests: Many[WarmStart], hidden: dict[int, torch.Tensor]) -> list[Signals]:
        """The head and the reduction, for requests with the same settings together."""
        results: dict[int, Signals] = {}
        settings = [(r.top_k, r.alpha_temperature, r.delta_temperature) for r in requests]
        for setting in sorted(set(settings), key=str):
            group = [i for i, other in enumerate(settings) if other == setting]
            signals = self._signals(torch.cat([hidden[i] for i in group]), *setting)
            ends = np.cumsum([len(requests[i].positions) for i in group])
            for i, end in zip(group, ends, strict=True):
                results[i] = signals[int(end) - len(requests[i].positions) : int(end)]
        return [results[i] for i in range(len(requests))]

    def _signals(self, hidden: torch.Tensor, top_k: int | None, alpha_t: float, delta_t: float) -> Signals:
        temperatures = {"alpha_temperature": alpha_t, "delta_temperature": delta_t}
        if top_k is None:
            return DenseSignals(at_least_fp32(self.model.head(hidden)), **temperatures)
        return ReferenceSignals.from_hidden(hidden, self.model.lm_head_weight, top_k, **temperatures)
