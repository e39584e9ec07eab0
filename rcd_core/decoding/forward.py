"""Batched passes of a model over pieces of canvases, with the slot cache or without. Target and reference share it.

A pass is prepared on the host as one array of integers and runs on the device without looking back: what the device
does depends on the array's `Shape` only, so that passes of one shape can be captured once and replayed (replays.py).

Shapes: R rows of a pass, Q queries, K keys, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.attention.backends import reads_pools
from rcd_core.attention.layouts import block_causal
from rcd_core.decoding.cache import CacheView, SlotCache
from rcd_core.decoding.state import ResidualState
from rcd_core.families.base import DiffusionModel

_PADDING_SHARE = 0.25  # of a pass's tokens may be padding, if rows so share it
MAX_PASS_TOKENS = 8192  # padding included; a longer row stands alone. Bounds the memory of a pass.
_PER_TOKEN, _PER_ROW = 4, 3  # integers: id, position, where it is written, residual; keys, block length, slot
_KEYS_STEP = 256  # passes of fixed shape read a multiple of so many keys

Integers = NDArray[np.int64]


class Work(NamedTuple):
    """One row of a pass: ids (q,) at positions [start, start + q), seeing keys [0, num_keys) of its slot. slot None:
    start is 0 and the row sees itself. residual: (slot, start, end), the state that masked tokens at positions
    [start, end) take in."""

    ids: Integers
    start: int
    num_keys: int
    block_length: int
    slot: int | None
    residual: tuple[int, int, int] | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


@dataclass(frozen=True)
class Shape:
    """All that decides what the device does. first: the rows' slots are first, first + 1, ...; None: any. one_block:
    each row's queries see all of its keys. fed: some token takes in a residual."""

    rows: int
    queries: int
    keys: int
    cached: bool
    first: int | None
    one_block: bool
    fed: bool


class Forward:
    """Runs rows together. The cache is made when the first row needs it. state: the residuals of its requests, if they
    have any."""

    def __init__(
        self, model: DiffusionModel, max_batch: int, max_length: int, state: ResidualState | None = None
    ) -> None:
        self.model, self.max_batch, self.max_length, self.state = model, max_batch, max_length, state
        self.pass_tokens = pass_tokens(model)
        self._reads_pools = reads_pools(model.config._attn_implementation)
        self._block_causal = model.attention_block(1) is not None
        self._cache: SlotCache | None = None

    @property
    def cache(self) -> SlotCache:
        if self._cache is None:
            self._cache = SlotCache(self.model, self.max_batch, self.max_length)
        return self._cache

    def reserve(self, length: int) -> bool:
        """Make room for canvases of this length. True if what the cache held is gone."""
        if length <= self.max_length:
            return False
        self.max_length, self._cache = max(length, 2 * self.max_length), None
        return True

    def hidden(self, works: Sequence[Work]) -> Tensor:
        """(R, Q, D) final hidden states of one batched pass; shorter rows are padded at the end."""
        numbers, shape = self.pack(works)
        return self.run(torch.from_numpy(numbers).to(self.model.device), shape)

    # -- on the host
    def pack(self, works: Sequence[Work], fixed: bool = False) -> tuple[Integers, Shape]:
        """The integers of a pass and its shape; works in the order of their slots. fixed: rows and keys are rounded up,
        so that few shapes occur; rows beyond the works compute something that nobody reads."""
        num_rows = _power_of_two(len(works)) if fixed else len(works)
        num_keys = max(w.num_keys for w in works)
        cached = works[0].slot is not None
        if fixed and cached:
            num_keys = min(self.max_length, -(-num_keys // _KEYS_STEP) * _KEYS_STEP)
        rows = np.zeros((5, num_rows), dtype=np.int64)  # start, length, keys, block length, slot
        rows[2:4] = 1
        rows[:, : len(works)] = np.array(
            [(w.start, len(w.ids), w.num_keys, w.block_length, w.slot or 0) for w in works]
        ).T
        start, length, keys, block_length, slot = rows
        width = int(length.max())
        columns = np.arange(width)
        tokens = np.empty((_PER_TOKEN, num_rows, width), dtype=np.int64)
        ids, positions, written, residual = tokens
        np.add(start[:, None], columns, out=positions)
        given = np.concatenate([w.ids for w in works])
        real: NDArray[np.bool_] | bool = True
        if len(given) == ids.size:
            ids.ravel()[:] = given
            np.add(positions, slot[:, None] * (self.max_length + 1), out=written)
        else:
            real = columns < length[:, None]
            ids.fill(self.model.info.pad_token_id)
            ids[real] = given
            np.maximum(np.minimum(positions, (start + length - 1)[:, None]), 0, out=positions)
            # Keys and values of padding go into the slot's bin.
            np.add(np.where(real, positions, self.max_length), slot[:, None] * (self.max_length + 1), out=written)
        fed = any(w.residual for w in works)
        if fed:
            assert self.state is not None
            states = np.zeros((3, num_rows), dtype=np.int64)
            states[:, : len(works)] = np.array([w.residual or (0, 0, 0) for w in works]).T
            owner, first, end = states[:, :, None]
            inside = (ids == self.model.mask_token_id) & (positions >= first) & (positions < end) & real
            places = owner * self.state.reach - first + positions
            np.copyto(residual, np.where(inside, places, self.state.nothing))
        one_block = True
        if self._block_causal:
            one_block = bool((start // block_length == (start + length - 1) // block_length)[: len(works)].all())
        # Slots are in order (`groups`), and nobody shares one.
        neighbours = len(works) == num_rows and int(slot[-1] - slot[0]) == num_rows - 1
        shape = Shape(
            rows=num_rows,
            queries=width,
            keys=num_keys if cached else width,
            cached=cached,
            first=int(slot[0]) if neighbours and (not fixed or slot[0] == 0) else None,
            one_block=one_block,
            fed=fed,
        )
        return np.concatenate([tokens.ravel(), keys, block_length, slot]), shape

    # -- on the device
    def run(self, numbers: Tensor, shape: Shape) -> Tensor:
        """(R, Q, D) of a packed pass; numbers may be longer than the pass needs."""
        model, num_tokens = self.model, shape.rows * shape.queries
        ids, positions, written, residual = numbers[: _PER_TOKEN * num_tokens].view(
            _PER_TOKEN, shape.rows, shape.queries
        )
        keys, block_length, slot = numbers[_PER_TOKEN * num_tokens :][: _PER_ROW * shape.rows].view(_PER_ROW, -1)
        embeds = model.embedding(ids)
        if shape.fed:
            assert self.state is not None
            embeds = self.state.blend(embeds, residual)
        layout = block_causal(
            positions, keys, shape.keys, block_length if self._block_causal else None, shape.one_block
        )
        view = None
        if shape.cached:
            pools = self._reads_pools and layout.lengths is not None
            layout.slots = slot if pools else None
            chosen = slot if shape.first is None else slice(shape.first, shape.first + shape.rows)
            view = CacheView(self.cache, written.flatten(), None if pools else chosen, shape.keys)
        return model.hidden(embeds, positions, layout, view)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def pass_tokens(model: DiffusionModel) -> int:
    """What it costs to make one more pass, in tokens: so many may be padding before two passes are cheaper than one.

    A rough model. A pass reads all weights, which takes as long as computing so many tokens as the device makes
    operations per byte (GPU: 200 in bf16; a CPU's cores: 10 in fp32); and without graphs its layers have to be called
    (0.35 ms each, at 30 GFLOP/s).
    """
    if model.device.type == "cuda":
        return 200
    calls = 0.35e-3 * model.config.num_hidden_layers * 30e9 / (2 * model.num_parameters())
    return 10 + int(calls)


def groups(works: Sequence[Work], spare: int = 0) -> list[list[int]]:
    """Indices of rows that go well together in one pass: same use of the cache, and little padding to the longest, a
    share of the tokens or `spare` of them. In each group slots are in order."""
    found: list[list[int]] = []
    padding = tokens = 0
    for index in sorted(range(len(works)), key=lambda i: (works[i].slot is None, len(works[i].ids))):
        length = len(works[index].ids)
        if found:
            last = works[found[-1][-1]]
            grown = padding + len(found[-1]) * (length - len(last.ids))
            fits = grown <= max(spare, _PADDING_SHARE * (tokens + length))
            fits &= length * (len(found[-1]) + 1) <= MAX_PASS_TOKENS
            if fits and (last.slot is None) == (works[index].slot is None):
                found[-1].append(index)
                padding, tokens = grown, tokens + length
                continue
        found.append([index])
        padding, tokens = 0, length
    return [sorted(group, key=lambda i: works[i].slot or 0) for group in found]
