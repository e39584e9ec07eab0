"""Runs the passes of a step: rows of tokens of many requests through the layers, over the pages of their caches.

A pass is packed on the host into one array of integers and runs on the device without synchronisation. Passes of fixed
shape (every row has as many tokens, few numbers of rows) depend on nothing but the array, so they can be captured once
and replayed (cuda_graphs.py).

Shapes: T tokens of the pass, R rows, B requests, C pages of a table, N masked positions to predict, D width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.attention.paged import Rows
from rcd_core.attention.paged_backends import PagedBackend
from rcd_core.decoding.chunk import Chunk, PassKind
from rcd_core.decoding.cuda_graphs import GraphCache
from rcd_core.decoding.layers import Layers
from rcd_core.decoding.masked_positions import MaskedPositions
from rcd_core.decoding.pages import PagedCache
from rcd_core.decoding.residual_state import ResidualState
from rcd_core.decoding.sampler import NUM_RESULTS, Sampler
from rcd_core.decoding.sequence import Sequence
from rcd_core.decoding.statistics import Statistics
from rcd_core.decoding.tables import Tables
from rcd_core.families.base import DiffusionModel

MAX_PASS_TOKENS = 8192  # a longer request gets a pass of its own. Bounds the memory of a pass.
_FIXED_QUERIES = 256  # longest row in a pass of fixed shape: blocks, not canvases
_ROW_LENGTHS = sorted(
    {a << b for a in (2, 3) for b in range(8)} | {1}
)  # of fixed shapes, at most 1.5 times the one before
# Packed integers: id, position, row of the cache, row of the residual state; with Loopholing the row that it writes.
_PER_TOKEN = 4

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class PassShape:
    """All that decides what the device does in a captured pass. queries: most tokens of a row."""

    tokens: int
    rows: int
    queries: int
    has_residual: bool


@dataclass(frozen=True)
class Packed:
    """integers: (4 T,) of the tokens, with Loopholing (5 T,), then the attention backend's. place (T',): where each
    real token stands among the T. starts, shifts (chunks,): a chunk's first position, and what makes a position of it
    an index into `place`."""

    integers: Integers
    shape: PassShape
    rows: Rows
    place: Integers
    starts: Integers
    shifts: Integers


class Forward:
    """Batched passes of one model; used for the target and the reference. state: the residuals of the requests, none
    for a reference."""

    def __init__(
        self,
        model: DiffusionModel,
        cache: PagedCache,
        tables: Tables,
        max_length: int,
        backend: PagedBackend,
        state: ResidualState | None = None,
    ) -> None:
        self.model, self.cache, self.tables = model, cache, tables
        self.max_length, self.backend = max_length, backend
        self.state = state or ResidualState(model, 0)
        self.layers = Layers(model.backbone.model, model.config)
        self.per_token = _PER_TOKEN + (model.loophole is not None)

    def pack(self, requests: Many[tuple[int, Many[Chunk]]], queries: int | None = None) -> Packed:
        """requests: (slot, chunks). queries: make a pass of fixed shape, in which each row has so many tokens and the
        number of rows is a power of two; results of the extra ones are discarded."""
        page, mask = self.cache.page_size, self.model.mask_token_id
        chunks = [(slot, chunk) for slot, several in requests for chunk in several]
        ids = np.concatenate([chunk.token_ids for _, chunk in chunks])
        columns = np.array(
            [(len(c.token_ids), c.start, c.num_keys, c.block_length or 1 << 40, slot, *(c.residual or (0, 0)), c.grid)
             for slot, c in chunks], dtype=np.int64,
        )  # fmt: skip
        lengths = columns[:, 0]
        chunk_ends = np.cumsum(lengths)
        shifts = chunk_ends - lengths - columns[:, 1]
        chunk = np.repeat(np.arange(len(chunks)), lengths)
        start, keys, block, slot, first, end, grid = columns[chunk, 1:].T
        positions = np.arange(len(ids)) - shifts[chunk]
        begins = ((positions - grid) % block == 0) | (positions == start)
        head = np.flatnonzero(begins)
        starts = np.concatenate([head, [len(ids)]])
        block_end = ((positions[head] - grid[head]) // block[head] + 1) * block[head] + grid[head]
        num_keys = np.minimum(keys[head], block_end)
        tables = self.tables.array
        tokens = np.empty((_PER_TOKEN, len(ids)), dtype=np.int64)
        tokens[0], tokens[1], tokens[3] = ids, positions, self.state.zero_row
        tokens[2] = tables[slot, positions // page] * page + positions % page
        inside = (positions >= first) & (positions < end)
        if self.model.loophole is None:
            inside &= ids == mask
        has_residual = bool(inside.any())
        if has_residual:
            width = self.state.positions_per_slot
            tokens[3, inside] = slot[inside] * width + positions[inside] % width
        if self.model.loophole is not None:
            spans = np.array([c.keeps or (0, 0) for _, c in chunks], dtype=np.int64)[chunk]
            tokens = np.concatenate([tokens, self._written(positions, slot, spans)[None]])
        request, place = slot[head], np.arange(len(ids))
        if queries is not None:
            # Extra tokens are written to page 0, which belongs to nobody, and extra rows see one key there.
            num_rows = 1 << (len(head) - 1).bit_length()
            row = np.cumsum(begins) - 1
            place = row * queries + place - head[row]
            padded = np.zeros((self.per_token, num_rows * queries), dtype=np.int64)
            padded[0], padded[3] = self.model.info.pad_token_id, self.state.zero_row
            padded[_PER_TOKEN:] = self.state.discard_row
            padded[:, place] = tokens
            tokens, starts = padded, np.arange(num_rows + 1) * queries
            extra = num_rows - len(head)
            num_keys = np.append(num_keys, np.ones(extra, np.int64))
            request = np.append(request, np.full(extra, len(tables) - 1))  # the table of nobody
        rows = Rows(starts, num_keys, request, tables, self.tables.lane_pages)
        longest = queries or int((starts[1:] - starts[:-1]).max())
        if queries is not None:  # one shape whether or not a request has residuals in this pass
            has_residual = self.state.positions_per_slot > 0
        shape = PassShape(tokens.shape[1], len(num_keys), longest, has_residual)
        integers = np.concatenate([tokens.ravel(), self.backend.integers(rows)])
        return Packed(integers, shape, rows, place, columns[:, 1], shifts)

    def _written(self, positions: Integers, slot: Integers, spans: Integers) -> Integers:
        """(T,) rows of the state that the tokens' own states go to: of the token that a row predicts. spans (T, 2): the
        positions that are kept, of each token's chunk."""
        of = positions + self.model.shifted
        width = max(1, self.state.positions_per_slot)
        kept = (of >= spans[:, 0]) & (of < spans[:, 1])
        return np.where(kept, slot * width + of % width, self.state.discard_row)

    def hidden(self, packed: Packed, at: Integers | None = None) -> Tensor:
        """(T, D) final hidden states. at (N,): only of these tokens, (N, D). On a CPU the last layer is not computed
        for the others beyond their keys and values; on a GPU it would be compiled once more for passes without any."""
        integers = torch.from_numpy(packed.integers).to(self.model.device)
        if at is None:
            return self.run(integers, packed.shape, packed.rows)
        some = torch.from_numpy(at).to(self.model.device)
        if self.model.device.type == "cpu":
            return self.run(integers, packed.shape, packed.rows, some)
        return self.run(integers, packed.shape, packed.rows).index_select(0, some)

    def run(self, integers: Tensor, shape: PassShape, rows: Rows, at: Tensor | None = None) -> Tensor:
        """The same from integers on the device, which may be longer than the pass needs. rows: only for backends that
        plan on the host."""
        num_tokens = self.per_token * shape.tokens
        ids, positions, write, residual_rows, *kept_at = integers[:num_tokens].view(self.per_token, -1)
        embeds = self.model.embedding(ids)
        if shape.has_residual or kept_at:
            embeds = self.state.blend(embeds, residual_rows)
        attend = self.backend.plan(integers[num_tokens:], rows, shape.rows, shape.queries, self.max_length, embeds)
        stream = self.layers(embeds, positions, write, attend, self.cache, None if kept_at else at)
        if kept_at:
            self.state.keep(kept_at[0], stream)
            stream = stream if at is None else stream.index_select(0, at)
        return self.layers.final_norm(stream)


class RequestPass(NamedTuple):
    """What one request needs in a step. num_masked: positions that it predicts."""

    sequence: Sequence
    kind: PassKind
    chunks: list[Chunk]
    num_tokens: int
    num_masked: int

    @property
    def denoises(self) -> bool:
        return self.kind == "denoise"

    @property
    def longest_row(self) -> int:
        return max(min(chunk.block_length or 1 << 40, len(chunk.token_ids)) for chunk in self.chunks)


class ModelRunner:
    """Forwards and predictions of one step, for the engine. fixed_shapes: passes over blocks are rounded up to few
    shapes and, on a GPU, captured."""

    def __init__(self, forward: Forward, fixed_shapes: bool, statistics: Statistics) -> None:
        self.model, self.forward = forward.model, forward
        self.fixed_shapes, self.statistics = fixed_shapes, statistics
        self.state = forward.state
        self.sampler = Sampler(self.model, self.state)
        self.graphs = GraphCache(self.model.device)
        self._hidden: Tensor | None = None  # what passes of fixed shape return

    def run(
        self, passes: Many[list[RequestPass]], masked: MaskedPositions, needs_hidden: bool
    ) -> tuple[NDArray[np.float32], Tensor | None]:
        """One forward per list of requests, with head and reduction. masked: in the order of the requests. Ends with
        one copy from the device.

        Returns (NUM_RESULTS, N) predictions (sampler.py), and the (N, D) hidden states if needs_hidden.
        """
        results = torch.empty(NUM_RESULTS, len(masked.positions), device=self.model.device, dtype=self.sampler.dtype)
        hidden: list[Tensor] = []
        done = num_blocks = 0
        for requests in passes:
            begun = time.perf_counter()
            fixed = self.fixed_shapes and max(r.longest_row for r in requests) <= _FIXED_QUERIES
            packed = self.forward.pack(
                [(r.sequence.slot, r.chunks) for r in requests],
                queries=_row_length(max(r.longest_row for r in requests)) if fixed else None,
            )
            part = slice(done, done + sum(r.num_masked for r in requests))
            blocks = num_blocks, num_blocks + sum(len(r.sequence.live) for r in requests if r.denoises)
            num_blocks = blocks[1]
            index = packed.place[_predicted(self.model, requests, packed, masked, part, blocks)]
            guided = any(r.sequence.settings.cfg_scale for r in requests)
            if fixed or guided:
                states = self._run_fixed(packed) if fixed else self.forward.hidden(packed)
            else:
                states, index = self.forward.hidden(packed, index), np.arange(len(index))
            kinds = [r.kind for r in requests]
            most = max(dict.fromkeys(kinds), key=kinds.count)
            self.statistics.add(most, len(requests), time.perf_counter() - begun)
            if part.start == part.stop:  # nothing to predict: prefills and stores
                continue
            begun = time.perf_counter()
            unconditional = None
            if guided:
                states = states.clone() if fixed else states
                unconditional = self._unconditional(requests, packed, states)
            self.sampler.predict(masked, part, states, index, unconditional, results, self.graphs if fixed else None)
            if needs_hidden:
                hidden.append(states[torch.from_numpy(index).to(states.device)])
            done = part.stop
            self.statistics.spend("choose", time.perf_counter() - begun)
        if not done:
            return np.zeros((NUM_RESULTS, 0), dtype=np.float32), None
        begun = time.perf_counter()
        found: NDArray[np.float32] = self.model.ranks.agree(results).cpu().numpy()
        self.statistics.spend("choose", time.perf_counter() - begun)
        return found, torch.cat(hidden) if needs_hidden else None

    def _unconditional(self, requests: Many[RequestPass], packed: Packed, states: Tensor) -> Tensor:
        """(T, D) like `states`, of guided requests without the prompt. The others take no part: their pages keep what
        they have. A guided request has no cache, so its own pages are written again in every pass."""
        guided = np.array([bool(r.sequence.settings.cfg_scale) for r in requests])
        without = [
            (r.sequence.slot, [_without_prompt(r.sequence, c) for c in r.chunks])
            for r in requests
            if r.sequence.settings.cfg_scale
        ]
        tokens = packed.place[np.repeat(guided, [r.num_tokens for r in requests])]
        result = states.clone()
        result[torch.from_numpy(tokens).to(states.device)] = self.forward.hidden(self.forward.pack(without))
        return result

    def _run_fixed(self, packed: Packed) -> Tensor:
        shape, rows = packed.shape, packed.rows
        if self._hidden is None or len(self._hidden) < shape.tokens:
            size = max(shape.tokens, MAX_PASS_TOKENS if self.model.device.type == "cuda" else 0)
            self._hidden = self.model.embedding.weight.new_empty(size, self.model.embedding.weight.shape[1])
            self.graphs.clear()
        buffer = self._hidden

        def run(integers: Tensor) -> None:
            buffer[: shape.tokens].copy_(self.forward.run(integers, shape, rows))

        # The pass writes to pages of requests: a warm-up on the same integers writes what the pass itself will write.
        # What Loopholing keeps would change the pass itself.
        warmup = packed.integers.copy()
        warmup[_PER_TOKEN * shape.tokens : self.forward.per_token * shape.tokens] = self.state.discard_row
        self.graphs(("layers", shape), packed.integers, warmup, run)
        return buffer


def group_requests(requests: Many[RequestPass], fixed_shapes: bool) -> list[list[RequestPass]]:
    """Requests that share a pass: at most MAX_PASS_TOKENS tokens. With fixed shapes, short and long rows are apart, and
    rows of different lengths too where padding would be most of a pass."""
    if not fixed_shapes and sum(request.num_tokens for request in requests) <= MAX_PASS_TOKENS:
        return [sorted(requests, key=_slot)] if requests else []
    passes: list[list[RequestPass]] = []
    tokens = longest = 0
    for request in sorted(requests, key=lambda r: r.longest_row) if fixed_shapes else requests:
        length = request.longest_row
        apart = fixed_shapes and passes and (length > 4 * longest or (length > _FIXED_QUERIES >= longest))
        if not passes or apart or tokens + request.num_tokens > MAX_PASS_TOKENS:
            passes.append([])
            tokens, longest = 0, length
        passes[-1].append(request)
        tokens += request.num_tokens
    return [sorted(group, key=_slot) for group in passes]


def _slot(request: RequestPass) -> int:
    return request.sequence.slot


def _row_length(longest: int) -> int:
    return next(length for length in _ROW_LENGTHS if length >= longest)


def _predicted(
    model: DiffusionModel,
    requests: Many[RequestPass],
    packed: Packed,
    masked: MaskedPositions,
    part: slice,
    blocks: tuple[int, int],
) -> Integers:
    """(n,) the tokens of a pass, before padding, that predict its masked positions. blocks: first and end of the
    pass's in masked.blocks."""
    positions, owners = masked.positions[part], masked.owner[part]
    if blocks[0]:
        owners = owners - blocks[0]
    starts, shifts = packed.starts, packed.shifts
    simple = len(starts) == len(requests) == blocks[1] - blocks[0] and all([r.kind == "denoise" for r in requests])
    if not simple:  # not one chunk with one block of each request
        chunk_of: list[int] = []  # of each block of this pass, in the order of `masked`
        at = 0
        for request in requests:
            live = iter(request.sequence.live if request.denoises else ())
            block = next(live, None)
            for chunk in request.chunks:
                while block is not None and (block.start < chunk.end or chunk is request.chunks[-1]):
                    chunk_of.append(at)
                    block = next(live, None)
                at += 1
        starts, shifts = starts[chunk_of], shifts[chunk_of]
    rows: Integers = model.predictors(positions + shifts[owners], positions == starts[owners])
    return rows


def _without_prompt(s: Sequence, chunk: Chunk) -> Chunk:
    """The unconditional row of classifier-free guidance, with masks in place of the prompt."""
    ids = chunk.token_ids.copy()
    ids[: max(0, s.num_prompt - chunk.start)] = s.model.mask_token_id
    return chunk._replace(token_ids=ids, keeps=None)
