"""Batched passes of a model over pieces of canvases, with the slot cache or without.

A pass is packed on the host into one array of integers, and runs on the device without synchronisation. What the device
does depends only on the array's `PassShape`, so passes of one shape can be captured once and replayed (cuda_graphs.py).

Shapes: N masked positions that a step predicts, R rows of a pass, Q queries, K keys, D width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.attention.backends import reads_pools
from rcd_core.attention.layouts import block_causal
from rcd_core.decoding.cache import CacheView, SlotCache
from rcd_core.decoding.cuda_graphs import GraphCache
from rcd_core.decoding.residual_state import ResidualState
from rcd_core.decoding.sampler import Sampler
from rcd_core.decoding.sequence import MaskedPositions, PassRow, Sequence
from rcd_core.decoding.statistics import Statistics
from rcd_core.families.base import DiffusionModel
from rcd_core.ops.reduce import Feedback

MAX_PASS_TOKENS = 8192  # with padding; a longer row gets a pass of its own. Bounds the memory of a pass.
_PADDING_SHARE = 0.25  # of a pass's tokens that may be padding, so that rows can share a pass
_PER_TOKEN, _PER_ROW = 4, 3  # packed integers: id, position, cache index, residual row; num_keys, block length, slot
_KEYS_STEP = 256  # fixed shapes: the number of keys is a multiple of this,
_POSITIONS_STEP = 64  # the number of predicted positions of this,
_FIXED_QUERIES = 256  # and a row has at most this many tokens: blocks, not prompts

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class PassShape:
    """All that decides what the device does. first_slot: the rows' slots are first_slot, first_slot + 1, ...; None: any
    slots. one_block: each row's queries see all of its keys. has_residual: some token takes in a residual."""

    rows: int
    queries: int
    keys: int
    cached: bool
    first_slot: int | None
    one_block: bool
    has_residual: bool


class BatchedForward:
    """Runs rows of requests together; used for the target and the reference. The cache is made when it is first needed.
    state: the residuals of the requests, none for a reference."""

    def __init__(
        self, model: DiffusionModel, max_batch: int, max_length: int, state: ResidualState | None = None
    ) -> None:
        self.model, self.max_batch, self.max_length = model, max_batch, max_length
        self.state = state or ResidualState(model, max_batch)
        self.spare_tokens = _spare_tokens(model)
        self._reads_pools = reads_pools(model.config._attn_implementation)
        self._block_causal = model.attention_block(1) is not None
        self._cache: SlotCache | None = None

    @property
    def cache(self) -> SlotCache:
        if self._cache is None:
            self._cache = SlotCache(self.model, self.max_batch, self.max_length)
        return self._cache

    def reserve(self, length: int) -> bool:
        """Make room for canvases of this length. Returns whether the cache lost its content."""
        if length <= self.max_length:
            return False
        self.max_length, self._cache = max(length, 2 * self.max_length), None
        return True

    def hidden(self, rows: Many[PassRow]) -> Tensor:
        """(R, Q, D) final hidden states of one batched pass; shorter rows are padded at the end."""
        packed, shape = self.pack(rows)
        return self.run(torch.from_numpy(packed).to(self.model.device), shape)

    def pack(self, rows: Many[PassRow], fixed: bool = False) -> tuple[Integers, PassShape]:
        """The integers of a pass and its shape. rows: in the order of their slots. fixed: round rows and keys up, so
        that few shapes occur; results of the extra rows are discarded."""
        num_rows = 1 << (len(rows) - 1).bit_length() if fixed else len(rows)
        num_keys = max(row.num_keys for row in rows)
        cached = rows[0].slot is not None
        if fixed and cached:
            num_keys = min(self.max_length, -(-num_keys // _KEYS_STEP) * _KEYS_STEP)
        columns = np.zeros((5, num_rows), dtype=np.int64)  # start, length, keys, block length, slot
        columns[2:4] = 1
        columns[:, : len(rows)] = np.array(
            [(row.start, len(row.token_ids), row.num_keys, row.block_length, row.slot or 0) for row in rows]
        ).T
        start, length, keys, block_length, slot = columns
        queries = int(length.max())
        offsets = np.arange(queries)
        tokens = np.empty((_PER_TOKEN, num_rows, queries), dtype=np.int64)
        ids, positions, cache_index, residual_rows = tokens
        np.add(start[:, None], offsets, out=positions)
        token_ids = np.concatenate([row.token_ids for row in rows])
        real: NDArray[np.bool_] | bool = True
        if len(token_ids) == ids.size:
            ids.ravel()[:] = token_ids
            np.add(positions, slot[:, None] * (self.max_length + 1), out=cache_index)
        else:
            real = offsets < length[:, None]
            ids.fill(self.model.info.pad_token_id)
            ids[real] = token_ids
            np.maximum(np.minimum(positions, (start + length - 1)[:, None]), 0, out=positions)
            # Keys and values of padding go to the slot's last position, which no query sees.
            np.add(np.where(real, positions, self.max_length), slot[:, None] * (self.max_length + 1), out=cache_index)
        has_residual = any(row.residual for row in rows)
        if has_residual:
            scopes = np.zeros((3, num_rows), dtype=np.int64)
            scopes[:, : len(rows)] = np.array([row.residual or (0, 0, 0) for row in rows]).T
            state_slot, first, end = scopes[:, :, None]
            inside = (ids == self.model.mask_token_id) & (positions >= first) & (positions < end) & real
            state_rows = state_slot * self.state.positions_per_slot - first + positions
            np.copyto(residual_rows, np.where(inside, state_rows, self.state.zero_row))
        one_block = True
        if self._block_causal:
            one_block = bool((start // block_length == (start + length - 1) // block_length)[: len(rows)].all())
        adjacent = len(rows) == num_rows and int(slot[-1] - slot[0]) == num_rows - 1  # slots are sorted and distinct
        shape = PassShape(
            rows=num_rows,
            queries=queries,
            keys=num_keys if cached else queries,
            cached=cached,
            first_slot=int(slot[0]) if adjacent and (not fixed or slot[0] == 0) else None,
            one_block=one_block,
            has_residual=has_residual,
        )
        return np.concatenate([tokens.ravel(), keys, block_length, slot]), shape

    def run(self, packed: Tensor, shape: PassShape) -> Tensor:
        """(R, Q, D) final hidden states of a packed pass. `packed` may be longer than the pass needs."""
        model, num_tokens = self.model, _PER_TOKEN * shape.rows * shape.queries
        ids, positions, cache_index, residual_rows = packed[:num_tokens].view(_PER_TOKEN, shape.rows, shape.queries)
        keys, block_length, slot = packed[num_tokens:][: _PER_ROW * shape.rows].view(_PER_ROW, -1)
        embeds = model.embedding(ids)
        if shape.has_residual:
            embeds = self.state.blend(embeds, residual_rows)
        layout = block_causal(
            positions, keys, shape.keys, block_length if self._block_causal else None, shape.one_block
        )
        view = None
        if shape.cached:
            from_pools = self._reads_pools and layout.lengths is not None
            layout.slots = slot if from_pools else None
            slots = slot if shape.first_slot is None else slice(shape.first_slot, shape.first_slot + shape.rows)
            view = CacheView(self.cache, cache_index.flatten(), None if from_pools else slots, shape.keys)
        return model.hidden(embeds, positions, layout, view)


class ModelRunner:
    """Forwards and predictions of one step, for the engine. fixed_shapes: passes over cached blocks are rounded up to
    few shapes and, on a GPU, captured."""

    def __init__(
        self, model: DiffusionModel, max_batch: int, max_length: int, fixed_shapes: bool, statistics: Statistics
    ) -> None:
        self.model, self.fixed_shapes, self.statistics = model, fixed_shapes, statistics
        self.state = ResidualState(model, max_batch)
        self.forward = BatchedForward(model, max_batch, max_length, self.state)
        self.sampler = Sampler(model, self.state)
        self.graphs = GraphCache(model.device)

    def run(
        self,
        sequences: Many[Sequence],
        rows: Many[PassRow],
        batches: Many[list[int]],
        masked: MaskedPositions,
        needs_hidden: bool,
    ) -> tuple[NDArray[np.float32], Tensor | None]:
        """One forward per batch (indices of rows), then head and reduction for all of them, or both in one captured
        pass. masked: in the order of the batches. Ends with one copy from the device.

        Returns (3, N) tokens, confidence, entropy, and the (N, D) hidden states unless all passes had fixed shapes.
        needs_hidden: no fixed shapes.
        """
        state_rows = self.state.rows_of(masked)
        feedback = masked.sequences[0].feedback if masked.sequences else None
        alike = all(s.settings.is_greedy and s.feedback == feedback for s in masked.sequences)
        with_entropy = any(s.needs_entropy for s in masked.sequences)
        guided = any(s.settings.cfg_scale for s in masked.sequences)
        fixed = self.fixed_shapes and alike and not needs_hidden and all(_fits_fixed_shape(row) for row in rows)
        hidden: list[Tensor] = []
        unconditional: list[Tensor] = []
        predictions: list[Tensor] = []
        num_requests = num_positions = 0  # of `masked`, done so far
        for batch in batches:
            begun = time.perf_counter()
            batch_rows = [rows[i] for i in batch]
            denoising = [i for i, row in enumerate(batch_rows) if row.kind == "denoise"]
            ends = masked.ends[num_requests : num_requests + len(denoising)]
            part = slice(num_positions, int(ends[-1]) if len(ends) else num_positions)
            if part.start == part.stop:  # nothing to predict: prefills and stores
                self.forward.hidden(batch_rows)
            else:
                packed, shape = self.forward.pack(batch_rows, fixed)
                # Where the masked positions lie among the R x Q tokens of the pass.
                offsets = np.array([i * shape.queries - batch_rows[i].start for i in denoising])
                tokens = masked.positions[part] + offsets[masked.owner[part] - num_requests]
                if fixed:
                    predictions.append(self._run_fixed(packed, shape, tokens, state_rows[part], feedback, with_entropy))
                else:
                    hidden.append(self._select(self.forward.run(self._upload(packed), shape), tokens))
                if guided:
                    without_prompt = [_without_prompt(sequences[i], rows[i]) for i in batch]
                    unconditional.append(self._select(self.forward.hidden(without_prompt), tokens))
            num_requests, num_positions = num_requests + len(denoising), part.stop
            kinds = [row.kind for row in batch_rows]
            self.statistics.add(max(dict.fromkeys(kinds), key=kinds.count), len(batch), time.perf_counter() - begun)
        if not hidden and not predictions:
            return np.zeros((3, 0), dtype=np.float32), None
        begun = time.perf_counter()
        states = _cat(hidden) if hidden else None
        if states is not None and alike:
            predictions = [self.sampler.greedy(states, self._upload(state_rows), feedback, with_entropy)]
        elif states is not None:
            plain = _cat(unconditional) if guided else None
            predictions = [self.sampler.mixed(masked, states, self._upload(state_rows), plain)]
        result: NDArray[np.float32] = _cat(predictions, 1).cpu().numpy()
        self.statistics.spend("choose", time.perf_counter() - begun)
        return result, states

    def _run_fixed(
        self,
        packed: Integers,
        shape: PassShape,
        tokens: Integers,
        state_rows: Integers,
        feedback: Feedback | None,
        with_entropy: bool,
    ) -> Tensor:
        """A pass of fixed shape, head and reduction included: (3, n) predictions for (n,) tokens of the pass. The
        number of positions is rounded up, and results of the extra ones go to the discard row."""
        count, extra = len(tokens), -len(tokens) % _POSITIONS_STEP
        size, discard = count + extra, self.state.discard_row
        tokens = np.concatenate([tokens, np.zeros(extra, dtype=np.int64)])

        def run(integers: Tensor) -> Tensor:
            hidden = self.forward.run(integers, shape).flatten(0, 1).index_select(0, integers[-2 * size : -size])
            return self.sampler.greedy(hidden, integers[-size:], feedback, with_entropy)

        inputs = np.concatenate([packed, tokens, state_rows, np.full(extra, discard)])
        warmup_inputs = np.concatenate([packed, tokens, np.full(size, discard)])
        result = self.graphs((shape, size, feedback, with_entropy), inputs, warmup_inputs, run)
        return result[:, :count].clone()

    def _select(self, hidden: Tensor, tokens: Integers) -> Tensor:
        return hidden.flatten(0, 1).index_select(0, self._upload(tokens))

    def _upload(self, integers: Integers) -> Tensor:
        return torch.from_numpy(integers).to(self.model.device)


def group_rows(rows: Many[PassRow], spare_tokens: int = 0) -> list[list[int]]:
    """Indices of rows that share a pass: same use of the cache, and padding to the longest row of at most a share of
    the tokens or `spare_tokens`. Each group is in the order of its slots."""
    groups: list[list[int]] = []
    padding = tokens = 0
    for index in sorted(range(len(rows)), key=lambda i: (rows[i].slot is None, len(rows[i].token_ids))):
        length = len(rows[index].token_ids)
        if groups:
            last = rows[groups[-1][-1]]
            padded = padding + len(groups[-1]) * (length - len(last.token_ids))
            fits = padded <= max(spare_tokens, _PADDING_SHARE * (tokens + length))
            fits &= length * (len(groups[-1]) + 1) <= MAX_PASS_TOKENS
            if fits and (last.slot is None) == (rows[index].slot is None):
                groups[-1].append(index)
                padding, tokens = padded, tokens + length
                continue
        groups.append([index])
        padding, tokens = 0, length
    return [sorted(group, key=lambda i: rows[i].slot or 0) for group in groups]


def _spare_tokens(model: DiffusionModel) -> int:
    """Cost of one more pass in tokens: with more padding than this, two passes are cheaper than one.

    A rough model. A pass reads all weights, which takes as long as computing as many tokens as the device makes
    operations per byte (GPU: 200 in bf16; a CPU's cores: 10 in fp32). Without graphs, calling a layer costs 0.35 ms, at
    30 GFLOP/s.
    """
    if model.device.type == "cuda":
        return 200
    return 10 + int(0.35e-3 * model.config.num_hidden_layers * 30e9 / (2 * model.num_parameters()))


def _fits_fixed_shape(row: PassRow) -> bool:
    return row.slot is not None and (row.kind != "denoise" or len(row.token_ids) <= _FIXED_QUERIES)


def _cat(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _without_prompt(s: Sequence, row: PassRow) -> PassRow:
    """The unconditional row of classifier-free guidance, with masks in place of the prompt."""
    ids = row.token_ids.copy()
    ids[: max(0, s.num_prompt - row.start)] = s.model.mask_token_id
    return row._replace(token_ids=ids)
