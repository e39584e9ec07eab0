"""The reference's part in decoding: one pass over a block that is still masked, giving signals for its start.

A local model and a remote replica answer the same call, so a target cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from rcd_core.decoding.cache import Slots
from rcd_core.decoding.forward import Forward, Work, groups
from rcd_core.families.base import DiffusionModel
from rcd_core.signals import DenseSignals, ReferenceSignals, Signals


@dataclass(frozen=True)
class WarmStart:
    """canvas_ids: everything the reference may see, masks in place (SDAR: up to the block's end; LLaDA: the whole
    canvas). positions: the masked positions wanted, absolute and ascending. top_k None: whole distributions, local
    references only. session: the same for all blocks of an answer, so that they can be sent where its context is."""

    canvas_ids: tuple[int, ...]
    positions: tuple[int, ...]
    block_length: int
    top_k: int | None = None
    alpha_temperature: float = 1.0
    delta_temperature: float = 1.0
    session: int = 0


class Reference(Protocol):
    """What an engine asks of a reference model, wherever it runs: one answer per request, in order. None in place of
    signals: it could not answer, the block starts from zero."""

    def signals(self, requests: Sequence[WarmStart]) -> Sequence[Signals | None]: ...


@runtime_checkable
class AsyncReference(Protocol):
    """A reference elsewhere: other requests' passes go on while it works."""

    def submit(self, requests: Sequence[WarmStart]) -> Sequence[Future[Signals | None]]: ...


class LocalReference:
    """A reference model in this process. SDAR's contexts stay in the cache from block to block, found again by their
    tokens: nobody has to say which request asks. cache_slots: contexts kept; the longest unused gives way. max_length:
    positions there is room for; a longer canvas makes more, and empties the cache."""

    def __init__(self, model: DiffusionModel, cache_slots: int = 64, max_length: int = 0) -> None:
        self.model = model
        self.cache_slots = cache_slots
        self.reused_tokens = 0  # of contexts, found in the cache
        self._forward = Forward(model, cache_slots, max_length)
        self._slots = Slots(cache_slots)

    @torch.inference_mode()
    def signals(self, requests: Sequence[WarmStart]) -> list[Signals]:
        """One Signals per request, rows in the order of its positions."""
        if requests and self._forward.reserve(max(len(r.canvas_ids) for r in requests)):
            self._slots = Slots(self.cache_slots)
        found: list[Signals] = []
        for start in range(0, len(requests), self.cache_slots):
            found += self._batch(requests[start : start + self.cache_slots])
        return found

    def _batch(self, requests: Sequence[WarmStart]) -> list[Signals]:
        works = [self._work(r) for r in requests]
        hidden: dict[int, torch.Tensor] = {}
        for group in groups(works, self._forward.pass_tokens):
            rows = self._forward.hidden([works[i] for i in group])
            for row, i in enumerate(group):
                at = np.asarray(requests[i].positions) - works[i].start
                hidden[i] = rows[row, torch.from_numpy(at).to(rows.device)]
        for request, work in zip(requests, works, strict=True):
            if work.slot is not None:
                self._slots.held[work.slot].stored = _context(request)
                self._slots.release(work.slot)
        return self._reduced(requests, hidden)

    def _work(self, request: WarmStart) -> Work:
        canvas = np.asarray(request.canvas_ids, dtype=np.int64)
        if self.model.attention_block(request.block_length) is None:
            return Work(canvas, 0, len(canvas), request.block_length, None)
        slot, source, reused = self._slots.take(canvas, request.block_length, _context(request))
        self.reused_tokens += reused
        if reused and source != slot:
            self._forward.cache.copy(source, slot, reused)
        return Work(canvas[reused:], reused, len(canvas), request.block_length, slot)

    def _reduced(self, requests: Sequence[WarmStart], hidden: dict[int, torch.Tensor]) -> list[Signals]:
        """The head, for requests alike in their reduction together."""
        found: dict[int, Signals] = {}
        kinds = [(r.top_k, r.alpha_temperature, r.delta_temperature) for r in requests]
        for kind in sorted(set(kinds), key=str):
            mine = [i for i, k in enumerate(kinds) if k == kind]
            signals = self._signals(torch.cat([hidden[i] for i in mine]), *kind)
            ends = np.cumsum([len(requests[i].positions) for i in mine])
            for i, end in zip(mine, ends, strict=True):
                found[i] = signals[int(end) - len(requests[i].positions) : int(end)]
        return [found[i] for i in range(len(requests))]

    def _signals(self, hidden: torch.Tensor, top_k: int | None, alpha_t: float, delta_t: float) -> Signals:
        temperatures = {"alpha_temperature": alpha_t, "delta_temperature": delta_t}
        if top_k is None:
            return DenseSignals(self.model.head(hidden).float(), **temperatures)
        return ReferenceSignals.from_hidden(hidden, self.model.lm_head_weight, top_k, **temperatures)


def _context(request: WarmStart) -> int:
    """Tokens before the block: all given or committed."""
    return request.positions[0] // request.block_length * request.block_length
