"""Attention backends: what transformer layers call with a Layout in place of a mask; no layout is full attention.

sdpa    PyTorch's scaled dot product. Small passes use one mask for all layers. Large ones go in tiles of queries that
        each read only the keys that some query of the tile sees, so that extra memory grows linearly with the length.
eager   plain matrix products: the reference for the others.
flex    FlexAttention with a BlockMask made from the extents of 128-token tiles; compiled on GPUs.
flash   flash-attn (an extra) where all queries of a row see the same prefix: LLaDA. Other layouts use sdpa, which a
        warning says, because flash-attn has no block-shaped masks.

Shapes: B rows, H query heads, G key/value heads, Q queries, K keys, d head width.
Each backend maps query (B, H, Q, d), key and value (B, G, K, d) to (B, Q, H, d).
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rcd_core.attention.layouts import Layout
from rcd_core.errors import UserError
from rcd_core.precision import at_least_fp32

DENSE_PAIRS = 1 << 20  # pairs of query and key, rows included, up to which one mask serves a whole pass
TILE = 256  # queries of a tile above that
FLEX_TILE = 128

log = logging.getLogger(__name__)
_attend = nn.functional.scaled_dot_product_attention


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout | None, scaling: float) -> Tensor:
    if layout is not None and query.shape[2] > TILE and math.prod(layout.shape) > DENSE_PAIRS:
        out = _tiled(query, key, value, layout, scaling)
    else:
        bias = None if layout is None else _bias(layout, query.dtype)
        out = _attend(query, key, value, attn_mask=bias, scale=scaling, enable_gqa=_grouped(query, key))
    return out.transpose(1, 2).contiguous()


def eager_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout | None, scaling: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if layout is not None:
        scores = scores + _bias(layout, query.dtype)
    weights = torch.softmax(at_least_fp32(scores), dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


def flex_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout | None, scaling: float) -> Tensor:
    """On CPUs not compiled and only forward. UserError if gradients are needed there (PyTorch has no backward)."""
    on_gpu = query.device.type == "cuda"
    if not on_gpu and torch.is_grad_enabled() and query.requires_grad:
        raise UserError("attention is 'flex', which PyTorch cannot train on a CPU; use 'sdpa'")
    block_mask = None if layout is None else _block_mask(layout)
    out = _flex(on_gpu)(query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=_grouped(query, key))
    return out.transpose(1, 2).contiguous()  # type: ignore[no-any-return]


def flash_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout | None, scaling: float) -> Tensor:
    """Keys beyond a row's length are left out instead of masked."""
    lengths = None if layout is None else layout.lengths
    if layout is not None and lengths is None:
        _warn_once()
        return sdpa_attention(query, key, value, layout, scaling)
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    options = {"softmax_scale": scaling, "causal": False}
    if torch.are_deterministic_algorithms_enabled():  # the forward pass always is
        options["deterministic"] = True
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))  # (B, Q, H, d)
    if layout is None or lengths is None:
        return flash_attn_func(q, k, v, **options)  # type: ignore[no-any-return]
    num_rows, num_queries, num_keys = layout.shape
    present = torch.arange(num_keys, device=lengths.device) < lengths[:, None]
    key_starts = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    starts = torch.arange(0, (num_rows + 1) * num_queries, num_queries, device=lengths.device, dtype=torch.int32)
    flat = q.reshape(num_rows * num_queries, *q.shape[2:])
    out = flash_attn_varlen_func(flat, k[present], v[present], starts, key_starts, num_queries, num_keys, **options)
    return out.view(q.shape)  # type: ignore[no-any-return]


@cache
def _warn_once() -> None:
    log.warning("attention is 'flash', but this layout needs block-shaped masks, which flash-attn lacks: sdpa runs")


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "sdpa": sdpa_attention,
    "eager": eager_attention,
    "flex": flex_attention,
    "flash": flash_attention,
}


@cache
def _register(name: str) -> str:
    """Make a backend known to transformers, and return its key there."""
    from transformers import AttentionInterface  # takes seconds, so it waits until a model is made

    backend = FUNCTIONS[name]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # within compiled layers: it plans on the host, and flex compiles itself
    def attention(module: nn.Module, *inputs: Any, scaling: float, **_: Any) -> tuple[Tensor, None]:
        """transformers' calling convention; inputs: query, key, value and, as the mask, the layout."""
        query, key, value, layout = inputs
        # Under autocast the rotation makes queries and keys fp32, and values stay bf16; kernels take one dtype.
        return backend(query.to(value.dtype), key.to(value.dtype), value, layout, scaling), None

    key = f"rcd_{name}"
    AttentionInterface.register(key, attention)
    return key


def backend_key(attention: str, device: torch.device | str = "cpu") -> str:
    """The key of a backend in transformers' registry; UserError if it is unknown or cannot run on this device.
    "auto" and "varlen" concern decoding (paged_backends.py) and mean sdpa here."""
    if attention in ("auto", "varlen"):
        return _register("sdpa")
    if attention not in FUNCTIONS:
        raise UserError(f"attention is {attention!r}; allowed: {', '.join(('auto', 'varlen', *FUNCTIONS))}")
    if attention == "flash":
        if importlib.util.find_spec("flash_attn") is None:
            raise UserError(
                "attention is 'flash' but the package flash-attn is not installed: pip install 'rcd-ray[flash]'"
            )
        if torch.device(device).type != "cuda":
            raise UserError(f"attention is 'flash' but the device is {device}; flash-attn runs on CUDA, use 'sdpa'")
    return _register(attention)


def _grouped(query: Tensor, key: Tensor) -> bool:
    """Grouped-query attention: fewer key heads than query heads."""
    return query.shape[1] != key.shape[1]


# -- sdpa


def _bias(layout: Layout, dtype: torch.dtype) -> Tensor:
    """(B, 1, Q, K), 0 or -inf, made once for all layers. From a boolean mask sdpa would make it in each layer."""
    if dtype not in layout.memo:
        visible = layout.visible()
        layout.memo[dtype] = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))
    bias: Tensor = layout.memo[dtype]
    return bias


def _tiled(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float) -> Tensor:
    """(B, H, Q, d), tile by tile. With gradients the backward pass computes each tile again, so that no mask outlives
    its tile."""
    num_queries = query.shape[2]
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    parts = []
    for start, seen in zip(range(0, num_queries, TILE), _seen(layout), strict=True):
        rows = slice(start, min(start + TILE, num_queries))
        arguments = (query[:, :, rows], key, value, layout, rows, seen, scaling)
        parts.append(checkpoint(_tile, *arguments, use_reentrant=False) if needs_grad else _tile(*arguments))
    return torch.cat(parts, dim=2)


def _seen(layout: Layout) -> list[Tensor]:
    """For each tile of queries, the keys (k,) that some query of some row sees. Found once for all layers, because
    their numbers come from the device."""
    if "seen" not in layout.memo:
        starts = range(0, layout.shape[1], TILE)
        tiles = torch.stack([layout.visible(slice(s, s + TILE)).any(2).any(0).flatten() for s in starts])
        layout.memo["seen"] = list(torch.split(tiles.nonzero()[:, 1], tiles.sum(1).tolist()))
    seen: list[Tensor] = layout.memo["seen"]
    return seen


def _tile(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, rows: slice, seen: Tensor, scaling: float
) -> Tensor:
    grouped, mask = _grouped(query, key), layout.visible(rows).index_select(3, seen)
    key, value = key.index_select(2, seen), value.index_select(2, seen)
    return _attend(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)


# -- flex


@cache
def _flex(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention as function

    if not compiled:
        return function
    made = torch.compile(function, dynamic=True)

    def run(*inputs: Any, **options: Any) -> Any:
        # Past its limit of recompilations PyTorch would run the form that holds all Q K scores, without a word.
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            return made(*inputs, **options)

    return run


def _block_mask(layout: Layout) -> Any:
    """A BlockMask of 128 x 128 tiles, made once for all layers. A tile is computed if the extents of its codes allow a
    visible pair, and needs no mask if they prove all pairs visible: Q K / 128^2 operations instead of Q K."""
    if "flex" in layout.memo:
        return layout.memo["flex"]
    from torch.nn.attention.flex_attention import BlockMask

    num_rows, num_queries, num_keys = layout.shape
    big = torch.iinfo(torch.int32).max
    low = _extents(layout.low, num_queries, big)
    high = _extents(layout.high, num_queries, big)
    own = _extents(layout.own, num_queries, big)
    own_first = own if layout.own_low is None else _extents(layout.own_low, num_queries, big)
    code = _extents(layout.code, num_keys, big)

    def meet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        return (a[0][:, :, None] <= b[1][:, None, :]) & (b[0][:, None, :] <= a[1][:, :, None])

    some = meet((low[0], high[1]), code) | meet((own_first[0], own[1]), code)
    every = (low[1][:, :, None] <= code[0][:, None, :]) & (code[1][:, None, :] <= high[0][:, :, None])
    # A tile that reaches beyond the end always needs the mask, which hides the missing tokens.
    every[:, -1] &= num_queries % FLEX_TILE == 0
    every[:, :, -1] &= num_keys % FLEX_TILE == 0

    def ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
        counts = chosen.sum(-1, dtype=torch.int32)
        indices = (~chosen).to(torch.int8).argsort(dim=-1, stable=True).int()
        return counts[:, None], indices[:, None].contiguous()

    low_n, high_n, own_n, code_n = layout.low, layout.high, layout.own, layout.code
    own_low_n = own_n if layout.own_low is None else layout.own_low

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        c = code_n[b, k]
        return ((c >= low_n[b, q]) & (c <= high_n[b, q])) | ((c >= own_low_n[b, q]) & (c <= own_n[b, q]))

    mask = BlockMask.from_kv_blocks(
        *ordered(some & ~every),
        *ordered(some & every),
        BLOCK_SIZE=FLEX_TILE,
        mask_mod=mask_mod,
        seq_lengths=(num_queries, num_keys),
    )
    layout.memo["flex"] = mask
    return mask


def _extents(values: Tensor, length: int, big: int) -> tuple[Tensor, Tensor]:
    """(B, N) -> smallest and largest value of each tile, both (B, tiles)."""
    missing = -length % FLEX_TILE
    shape = (values.shape[0], -1, FLEX_TILE)
    smallest = nn.functional.pad(values, (0, missing), value=big).view(shape).amin(-1)
    largest = nn.functional.pad(values, (0, missing), value=-big).view(shape).amax(-1)
    return smallest, largest
