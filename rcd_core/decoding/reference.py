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

from rcd_core.attention.paged_backends import paged_backend
from rcd_core.decoding.chunk import Chunk, Positions
from rcd_core.decoding.model_runner import MAX_PASS_TOKENS, Forward
from rcd_core.decoding.pages import Ids, PagedCache, bytes_per_position, page_size_of
from rcd_core.decoding.sequence import LiveBlock
from rcd_core.decoding.tables import Tables
from rcd_core.dense_signals import HiddenSignals
from rcd_core.families.base import DiffusionModel
from rcd_core.ops.tiles import tile_rows
from rcd_core.signals import ReferenceSignals, Signals


@dataclass(frozen=True)
class WarmStart:
    """A request to a reference. canvas_ids: all that it may see, with masks (SDAR: up to the block's end; LLaDA: the
    whole canvas). positions: masked positions to predict, absolute and ascending. top_k None: whole distributions, for
    local references only. session: the same for all blocks of an answer, to route them to one replica's cache. grid: of
    Chunk."""

    canvas_ids: tuple[int, ...]
    positions: tuple[int, ...]
    block_length: int
    top_k: int | None = None
    alpha_temperature: float = 1.0
    delta_temperature: float = 1.0
    session: int = 0
    grid: int = 0

    @classmethod
    def of(
        cls, block: LiveBlock, positions: Positions, top_k: int | None = None, session: int = 0, **temperatures: float
    ) -> WarmStart:
        """positions (N,), predicted from the canvas as it is now."""
        return cls(
            canvas_ids=tuple(block.sequence.canvas[: block.visible_end].tolist()),
            positions=tuple(positions.tolist()),
            block_length=block.settings.block_length,
            top_k=top_k,
            session=session,
            grid=block.sequence.grid,
            **temperatures,
        )

    @property
    def context_length(self) -> int:
        """Tokens before the block, all given or committed."""
        first = self.positions[0] - self.grid
        return max(0, first // self.block_length * self.block_length + self.grid)


class Reference(Protocol):
    """A reference that blocks until it has answered: one result per request, in order. None: it could not answer, and
    the block starts from zero."""

    def signals(self, requests: Many[WarmStart]) -> Many[Signals | None]: ...


@runtime_checkable
class AsyncReference(Protocol):
    """A reference elsewhere. Other requests continue while it works."""

    def submit(self, requests: Many[WarmStart]) -> Many[Future[Signals | None]]: ...


@dataclass
class Context:
    """The pages of a slot hold the exact keys and values of ids[:stored]. block_length, grid: others are another
    attention."""

    block_length: int
    grid: int
    ids: Ids
    stored: int = 0


class LocalReference:
    """A reference model in this process. SDAR's contexts stay in the cache from block to block and are found by their
    tokens. cache_slots: most contexts that are kept, then the least recently used is dropped. max_length: positions of
    a context; a longer canvas enlarges them, which empties the cache."""

    def __init__(self, model: DiffusionModel, cache_slots: int = 64, max_length: int = 0) -> None:
        self.model = model
        self.cache_slots, self.max_length = cache_slots, max_length
        self._most_contexts = cache_slots
        self.reused_tokens = 0  # context tokens that were in the cache
        self._page_size = page_size_of(model.device)
        self._backend = paged_backend(model.attention, model.config, model.dtype, model.device, self._page_size)
        self._forward: Forward | None = None
        self._free: list[int] = []  # in order of release
        self._contexts: dict[int, Context] = {}

    @torch.inference_mode()
    def signals(self, requests: Many[WarmStart]) -> list[Signals]:
        """One Signals per request, rows in the order of its positions."""
        forward = self._reserve(max((len(r.canvas_ids) for r in requests), default=0))
        signals: list[Signals] = []
        most = 1 if torch.are_deterministic_algorithms_enabled() else self.cache_slots
        for start in range(0, len(requests), most):
            signals += self._batch(forward, requests[start : start + most])
        return signals

    def missing_bytes(self, contexts: int, length: int) -> int:
        """What `plan` with these arguments takes beyond the cache there is; negative if that is larger."""
        if self._has_room(contexts, length):
            return 0
        c = self._forward.cache if self._forward is not None else None
        held = sum(t.nbytes for t in (*c.keys, *c.values)) if c is not None else 0
        pages = min(contexts, self._most_contexts) * -(-length // self._page_size) + 1
        return pages * self._page_size * bytes_per_position(self.model) - held

    def plan(self, contexts: int, length: int) -> None:
        """Make room for so many contexts, at most cache_slots, of this length; a new cache replaces one without room.
        Without a plan there is room for cache_slots contexts."""
        if not self._has_room(contexts, length):
            self.cache_slots, self.max_length = min(contexts, self._most_contexts), length
            self._forward = None

    def restart(self, contexts: int, length: int) -> None:
        """Drop the contexts, and plan for so many of this length."""
        self.cache_slots, self.max_length, self._forward = contexts, length, None

    def _has_room(self, contexts: int, length: int) -> bool:
        enough = self.cache_slots >= min(contexts, self._most_contexts) and self.max_length >= length
        return enough and self._forward is not None

    def _reserve(self, length: int) -> Forward:
        if self._forward is None or length > self.max_length:
            if length > self.max_length:
                self.max_length = max(length, 2 * self.max_length)
            tables = Tables(self.cache_slots, self.max_length, self._page_size)
            tables.fill()
            cache = PagedCache(self.model, tables.num_pages, self._page_size)
            self._forward = Forward(self.model, cache, tables, self.max_length, self._backend)
            self._free, self._contexts = list(range(self.cache_slots)), {}
        return self._forward

    def _batch(self, forward: Forward, requests: Many[WarmStart]) -> list[Signals]:
        rows = sorted((*self._row(forward, request), i) for i, request in enumerate(requests))
        hidden: dict[int, torch.Tensor] = {}
        while rows:
            count = tokens = 0
            while count < len(rows) and (not count or tokens + len(rows[count][1].token_ids) <= MAX_PASS_TOKENS):
                tokens += len(rows[count][1].token_ids)
                count += 1
            group, rows = rows[:count], rows[count:]
            index, at = list[Positions](), 0
            for _, chunk, i in group:
                within = np.asarray(requests[i].positions, dtype=np.int64) - chunk.start
                index.append(self.model.predictors(within + at, within == 0))
                at += len(chunk.token_ids)
            packed = forward.pack([(slot, [chunk]) for slot, chunk, _ in group])
            states = torch.split(forward.hidden(packed, np.concatenate(index)), [len(part) for part in index])
            for (slot, chunk, i), part in zip(group, states, strict=True):
                hidden[i] = part
                self._contexts[slot].stored = requests[i].context_length if chunk.block_length is not None else 0
                self._free.append(slot)
        return self._reduce(requests, hidden)

    def _row(self, forward: Forward, request: WarmStart) -> tuple[int, Chunk]:
        """The request's slot and what runs: all tokens behind the context that a slot holds already."""
        canvas, b = np.asarray(request.canvas_ids, dtype=np.int64), request.block_length
        causal = self.model.attention_block(b) is not None
        # A context of another request was computed in passes of another shape, hence with another rounding.
        reusable = causal and not torch.are_deterministic_algorithms_enabled()
        source, reused = self._find(canvas, b, request.grid, request.context_length if reusable else 0)
        slot = source if source in self._free else self._free[0]
        self._free.remove(slot)
        if reused and source != slot:
            pages = -(-reused // self._page_size)
            forward.cache.copy(*(forward.tables.array[i, :pages].tolist() for i in (source, slot)))
        self._contexts[slot] = Context(b, request.grid, canvas, reused)
        self.reused_tokens += reused
        if not causal:
            return slot, Chunk(canvas, 0, len(canvas), None)
        return slot, Chunk(canvas[reused:], reused, len(canvas), b, grid=request.grid)

    def _find(self, ids: Ids, block_length: int, grid: int, limit: int) -> tuple[int, int]:
        """(slot, tokens): the slot with the longest common beginning, in whole blocks of ids[:limit]."""
        best = (-1, 0)
        for slot, context in self._contexts.items() if limit else ():
            if (context.block_length, context.grid) == (block_length, grid):
                length = min(context.stored, limit)
                different = np.flatnonzero(context.ids[:length] != ids[:length])
                length = int(different[0]) if len(different) else length
                length = max(0, length - (length - grid) % block_length)
                # A free slot wins a tie, because it needs no copy.
                if length > best[1] or (length == best[1] > 0 and slot in self._free):
                    best = (slot, length)
        return best

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
            return HiddenSignals(hidden, self.model.head, self.model.vocab_size, **temperatures)
        tiles = torch.split(hidden, tile_rows(self.model.vocab_size, hidden.device))
        parts = [ReferenceSignals.from_logits(self.model.head(tile), top_k, **temperatures) for tile in tiles]
        return ReferenceSignals.cat(parts)
