"""Attention of decoding: rows of tokens over the pages of their requests.

A pass is a list of rows. A row's queries see the keys [0, num_keys) of its request, so there is no mask: what a layout
expresses as a mask is expressed by the rows' lengths. Keys and values are written to the pages before attention.

    sdpa     PyTorch's scaled dot product over the pages of each request: in place where they are neighbours, else
             gathered. Any device and dtype.
    eager    plain matrix products over gathered pages, one row at a time: the reference for the others.
    varlen   torch.nn.attention.varlen: flash kernels that follow the page table. CUDA, bf16 or fp16.
    flash    flash-attn's function (an extra), likewise.

Shapes: T tokens of the pass, R rows, S slots, B requests, Q queries of a request, K keys, C pages of a row, P pages, p
positions of a page, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Integers = NDArray[np.int64]
TILE = 256  # most queries of a request that sdpa takes at once where they see different keys
_FOLDED = 64  # up to so many queries, heads that share a key head are folded into the queries
_OCCUPIED = 0.6  # share of neighbouring slots in a pass from which their pages are read in place


@dataclass(frozen=True)
class Rows:
    """The rows of a pass, on the host. Rows of a request are neighbours, and requests are in the order of their slots.

    starts (R + 1,): where each row's tokens begin in the pass. num_keys (R,). slot (R,): of the row's request. tables
    (S, C): page of each part of a request, 0 where there is none. lane_pages: the pages of slot s, if it has any, are
    1 + s lane_pages and those behind it; None: they may be anywhere.
    """

    starts: Integers
    num_keys: Integers
    slot: Integers
    tables: Integers
    lane_pages: int | None = None


class Attend(Protocol):
    """One pass's attention, planned once for all layers: queries (T, H, d) and one layer's pages, (P p, G, d) each
    -> (T, H, d)."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor: ...


# -- sdpa and eager: planned on the host


class _Part(NamedTuple):
    """Requests with about equally many queries, Q with padding. tokens: (n,) theirs in the pass, or a slice if none is
    padded. places (n,): where they stand among the B Q queries. pages: (first page, pages between two requests) to read
    keys in place, or (B C',) page numbers. bias or None: 0 or -inf, (B, 1, Q, K), or with `folded`, where heads of one
    key head are more queries of it, (B, 1, Q H / G, K)."""

    num_requests: int
    num_queries: int
    num_keys: int
    tokens: Tensor | slice
    places: Tensor | None
    pages: tuple[int, int] | Tensor
    bias: Tensor | None
    folded: bool


class SdpaAttention:
    def __init__(self, rows: Rows, page_size: int, heads: int, groups: int, like: Tensor) -> None:
        self.page_size, self.groups, self.device, self.dtype = page_size, groups, like.device, like.dtype
        self.fold = heads // groups  # query heads that share a key head
        self.rows = rows
        counts = np.diff(rows.starts)
        self.seen = np.repeat(rows.num_keys, counts)  # keys that each token sees
        edges = np.flatnonzero(np.diff(rows.slot, prepend=-1))  # the first row of each request
        begins, slots = rows.starts[edges], rows.slot[edges]
        ends = np.append(begins[1:], rows.starts[-1])
        sizes = ends - begins
        classes = np.ceil(np.log2(np.maximum(sizes, 2)))
        self.parts: list[_Part] = []
        for size in np.unique(classes):
            same = classes == size
            begin, end, slot = begins[same], ends[same], slots[same]
            alike = self.seen[begin] == self.seen[end - 1]
            if 2**size <= TILE or alike.all():
                self.parts.append(self._part(begin, end, slot))
                continue
            for i in range(len(slot)):  # each tile of queries reads only the keys that it sees
                for at in range(begin[i], end[i], TILE):
                    tile = np.array([at]), np.array([min(at + TILE, end[i])])
                    self.parts.append(self._part(*tile, slot[i : i + 1]))

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        heads, width, out = query.shape[1], query.shape[2], None
        for part in self.parts:
            q = query if len(self.parts) == 1 and isinstance(part.tokens, slice) else query[part.tokens]
            count, size = part.num_requests, part.num_queries
            if part.places is not None:
                q = q.new_zeros(count * size, heads, width).index_copy_(0, part.places, q)
            q = q.view(count, size, self.groups, -1, width).permute(0, 2, 3, 1, 4)  # (B, G, H / G, Q, d)
            q = q.reshape(count, self.groups if part.folded else heads, -1, width)
            k, v = (self._read(pool, part) for pool in (keys, values))
            result = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=part.bias, scale=scaling, enable_gqa=self.fold > 1 and not part.folded
            )
            result = result.view(count, self.groups, -1, size, width).permute(0, 3, 1, 2, 4).reshape(-1, heads, width)
            if part.places is not None:
                result = result.index_select(0, part.places)
            if len(self.parts) == 1:
                return result
            out = query.new_empty(query.shape) if out is None else out
            out[part.tokens] = result
        assert out is not None
        return out

    def _read(self, pool: Tensor, part: _Part) -> Tensor:
        """(B, G, K, d)."""
        if isinstance(part.pages, tuple):
            first, between = part.pages
            position, group, unit = pool.stride()
            size = (part.num_requests, part.num_keys, *pool.shape[1:])
            strides = (between * self.page_size * position, position, group, unit)
            offset = pool.storage_offset() + first * self.page_size * position
            return pool.as_strided(size, strides, offset).transpose(1, 2)
        pages = pool.view(-1, self.page_size * pool.shape[1] * pool.shape[2]).index_select(0, part.pages)
        return pages.view(part.num_requests, -1, *pool.shape[1:])[:, : part.num_keys].transpose(1, 2)

    def _part(self, begin: Integers, end: Integers, slot: Integers) -> _Part:
        """The tokens [begin, end) (B,) of requests `slot` (B,)."""
        sizes, num_queries = end - begin, int((end - begin).max())
        owner = np.repeat(np.arange(len(slot)), sizes)
        offset = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        tokens = begin[owner] + offset
        visible = self.seen[tokens]
        num_keys = int(visible.max())
        columns = -(-num_keys // self.page_size)
        tables, lane = self.rows.tables[slot, :columns], self.rows.lane_pages
        row, count = owner, len(slot)
        pages: tuple[int, int] | Tensor
        span = int(slot[-1] - slot[0]) + 1
        if lane is not None and span * _OCCUPIED <= count and slot[-1] < len(self.rows.tables) - 1:
            # Slots without a request in between are computed too; what comes out is dropped.
            pages, row, count = (1 + int(slot[0]) * lane, lane), (slot - slot[0])[owner], span
        else:
            pages = torch.from_numpy(tables.ravel()).to(self.device)
        places = row * num_queries + offset
        hidden = np.zeros((count, num_queries), dtype=np.int64)
        hidden.ravel()[places] = num_keys - visible
        bias, folded = None, self.fold > 1 and num_queries <= _FOLDED
        if hidden.any():
            mask = np.arange(num_keys) >= (num_keys - hidden)[:, :, None]
            bias = torch.zeros(mask.shape, dtype=self.dtype)
            bias = bias.masked_fill_(torch.from_numpy(mask), float("-inf")).to(self.device)[:, None]
            bias = bias.repeat(1, 1, self.fold, 1) if folded else bias
        if len(places) == count * num_queries and tokens[-1] - tokens[0] + 1 == len(tokens):
            return _Part(
                count, num_queries, num_keys, slice(int(tokens[0]), int(tokens[-1]) + 1), None, pages, bias, folded
            )
        where = [torch.from_numpy(n).to(self.device) for n in (tokens, places)]
        return _Part(count, num_queries, num_keys, where[0], where[1], pages, bias, folded)


@dataclass
class EagerAttention:
    rows: Rows
    page_size: int

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        out = query.new_empty(query.shape)
        r = self.rows
        for row in range(len(r.num_keys)):
            table = torch.from_numpy(r.tables[r.slot[row]]).to(query.device)
            tokens = slice(int(r.starts[row]), int(r.starts[row + 1]))
            k, v = (
                pool.view(-1, self.page_size, *pool.shape[1:])[table].flatten(0, 1)[: r.num_keys[row]]
                .repeat_interleave(query.shape[1] // pool.shape[1], 1)
                for pool in (keys, values)
            )  # fmt: skip
            scores = torch.einsum("qhd,khd->hqk", query[tokens], k) * scaling
            out[tokens] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        return out


# -- varlen and flash: planned on the device, from tensors of fixed shape, so that a pass can be captured


@dataclass
class VarlenAttention:
    """starts (R + 1,) and num_keys (R,), int32. tables (R, C) int32: page table of each row. first_keys (R + 1,) int32:
    instead of tables, where the keys of each row begin in the cache; the kernel in PyTorch 2.13 itself follows no
    table (flash-attn 3 does, activated by torch.nn.attention.activate_flash_attention_impl). max_queries, max_keys:
    bounds. num_splits 1: a row's result does not depend on the others, bit for bit."""

    starts: Tensor
    num_keys: Tensor
    tables: Tensor | None
    first_keys: Tensor | None
    page_size: int
    max_queries: int
    max_keys: int
    num_splits: int | None = None

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        if self.tables is not None:
            keys, values = (pool.view(-1, self.page_size, *pool.shape[1:]) for pool in (keys, values))
        out = varlen_attn(
            query,
            keys,
            values,
            self.starts,
            self.first_keys,
            self.max_queries,
            self.max_keys,
            scale=scaling,
            enable_gqa=query.shape[1] != keys.shape[-2],
            seqused_k=self.num_keys,
            block_table=self.tables,
            num_splits=self.num_splits,
        )
        assert isinstance(out, Tensor)
        return out


@dataclass
class FlashAttention:
    """The same by the package flash-attn 2. key_starts (R + 1,) int32: running sums of num_keys."""

    starts: Tensor
    key_starts: Tensor
    tables: Tensor
    page_size: int
    max_queries: int
    max_keys: int

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        from flash_attn import flash_attn_varlen_func

        keys, values = (pool.view(-1, self.page_size, *pool.shape[1:]) for pool in (keys, values))
        out: Tensor = flash_attn_varlen_func(
            query,
            keys,
            values,
            self.starts,
            self.key_starts,
            self.max_queries,
            self.max_keys,
            softmax_scale=scaling,
            causal=False,
            block_table=self.tables,
        )
        return out
