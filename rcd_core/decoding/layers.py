"""The layers of a model as decoding runs them: projections joined, norms and rotation in few operations.

They compute what the backbone's own layers compute. Weights are not copied: the joined matrices hold the backbone's
parameters, which become views of them. What lies between matrix products and attention is compiled on CUDA into one
kernel each (TORCH_COMPILE_DISABLE=1 turns it off): one compilation serves all layers and lengths.

Shapes: T tokens of a pass, N of them, D width, F width of the MLP, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcd_core.attention.paged import Attend
from rcd_core.decoding.pages import PagedCache
from rcd_core.families.quantise import is_quantised
from rcd_core.ops.ranks import ALONE, Ranks


@dataclass
class Buffers:
    """What all layers of a pass write to. heads (T, H + 2 G, d): queries, keys and values; the others are views."""

    heads: Tensor
    rotated: Tensor  # (T, H + G, d)
    flat: Tensor  # (T, (H + 2 G) d)
    gate_up: Tensor  # (T, 2 F)
    cos: Tensor  # (T, 1, r), r rotated of d numbers
    sin: Tensor  # (T, 1, r); the first half is negative

    @property
    def num_tokens(self) -> int:
        return len(self.flat)


class Layers:
    """The transformer layers and the last norm of a backbone of transformers."""

    def __init__(self, body: Any, config: Any, compiled: bool | None = None) -> None:
        """compiled None: on CUDA, unless deterministic algorithms are asked for: how a compiled function sums depends
        on the shapes that it was first called with."""
        self.body, self.config = body, config
        if compiled is None:
            compiled = body.norm.weight.is_cuda and not torch.are_deterministic_algorithms_enabled()
        self.layers = [Layer(layer, config, compiled) for layer in body.layers]
        self.norm, self.eps = body.norm.weight, config.rms_norm_eps

    def __call__(
        self,
        embeds: Tensor,
        positions: Tensor,
        write: Tensor,
        attend: Attend,
        cache: PagedCache,
        at: Tensor | None = None,
    ) -> Tensor:
        """(T, D) input embeddings of tokens at positions (T,), whose keys and values go to rows `write` (T,) of the
        cache -> (T, D) residual stream behind the last layer. at (N,): only of these tokens, (N, D)."""
        b = self._buffers(embeds, positions)
        hidden, last = embeds, self.layers[-1]
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            hidden = layer(hidden, b, write, attend, keys, values, at if layer is last else None)
        return hidden

    def final_norm(self, stream: Tensor) -> Tensor:
        """(T, D) -> (T, D) final hidden states."""
        return F.rms_norm(stream, stream.shape[-1:], self.norm, self.eps)

    def _buffers(self, embeds: Tensor, positions: Tensor) -> Buffers:
        c, tokens = self.config, len(embeds)
        queries, keys = c.num_attention_heads, c.num_key_value_heads
        flat = embeds.new_empty(tokens, (queries + 2 * keys) * c.head_dim)
        heads = flat.view(tokens, -1, c.head_dim)
        cos, sin = self.body.rotary_emb(embeds, positions[None])
        half = cos.shape[-1] // 2
        sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        return Buffers(
            heads=heads,
            rotated=heads[:, : queries + keys],
            flat=flat,
            gate_up=embeds.new_empty(tokens, 2 * c.intermediate_size),
            cos=cos[0, :, None],
            sin=sin[:, None],
        )


class Layer:
    """One layer: attention with grouped heads, norms of queries and keys where the model has them, and a gated MLP or a
    mixture of experts, which is transformers' own."""

    def __init__(self, layer: Any, config: Any, compiled: bool) -> None:
        self.rotate: Callable[..., None] = _compiled(normed_and_rotated) if compiled else normed_and_rotated
        self.gate: Callable[..., Tensor] = _compiled(gated) if compiled else gated
        attention, mlp = layer.self_attn, layer.mlp
        self.eps = config.rms_norm_eps
        self.queries, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.scaling: float = attention.scaling
        self.clip: float | None = getattr(attention, "clip", None)  # of queries, keys and values
        self.norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.qkv = _linear([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = _linear([attention.o_proj])
        self.experts = mlp if hasattr(mlp, "experts") else None
        if self.experts is None:
            self.gate_up = _linear([mlp.gate_proj, mlp.up_proj])
            self.down = _linear([mlp.down_proj])
        self.head_norms: Tensor | None = None  # (H + G, d)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
            self.head_norms = torch.stack([query] * self.queries + [key] * self.groups)

    def __call__(
        self,
        x: Tensor,
        b: Buffers,
        write: Tensor,
        attend: Attend,
        keys: Tensor,
        values: Tensor,
        at: Tensor | None = None,
    ) -> Tensor:
        """(T, D) -> (T, D), or of tokens `at` (N,): what they do not need is not computed. `at` may name one twice."""
        normed = F.rms_norm(x, x.shape[-1:], self.norms[0], self.eps)
        self.qkv(normed, out=b.flat)
        self.rotate(b.rotated, self.head_norms, b.cos, b.sin, self.eps, self.clip)
        if self.clip is not None:
            b.heads[:, self.queries + self.groups :].clamp_(-self.clip, self.clip)
        query, key, value = torch.split(b.heads, [self.queries, self.groups, self.groups], 1)
        keys.index_copy_(0, write, key)
        values.index_copy_(0, write, value)
        attended = attend(query, keys, values, self.scaling).reshape(len(x), -1)
        gate_up = b.gate_up
        if at is not None:
            x, attended = x.index_select(0, at), attended.index_select(0, at)
            gate_up = gate_up.new_empty(len(at), gate_up.shape[1])
        x = self.out.added(x, attended)
        normed = F.rms_norm(x, x.shape[-1:], self.norms[1], self.eps)
        if self.experts is not None:
            return x + self.experts(normed[None])[0]  # type: ignore[no-any-return]
        self.gate_up(normed, out=gate_up)
        return self.down.added(x, self.gate(gate_up))


def normed_and_rotated(
    heads: Tensor, norms: Tensor | None, cos: Tensor, sin: Tensor, eps: float, clip: float | None = None
) -> None:
    """In place: queries and keys (T, H + G, d), normed with weights (H + G, d) if there are any, and clipped. Of each
    head only the first r numbers are rotated; cos, sin: (T, 1, r)."""
    width, x = cos.shape[-1], heads
    if norms is not None:
        x = F.rms_norm(heads, heads.shape[-1:], None, eps).mul_(norms)
    if clip is not None:
        x = x.clamp(-clip, clip)
    if width < heads.shape[-1]:
        if x is not heads:
            heads[..., width:] = x[..., width:]
        heads, x = heads[..., :width], x[..., :width]
    if torch.compiler.is_compiling():  # which refuses `out` that is not contiguous
        heads.copy_(torch.addcmul(x * cos, x.roll(width // 2, -1), sin))
    else:
        torch.addcmul(x * cos, x.roll(width // 2, -1), sin, out=heads)


def gated(gate_up: Tensor) -> Tensor:
    """(T, 2 F) -> (T, F)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, dynamic=True, fullgraph=True)
    return compiled


class Joined:
    """Linear layers with one input as one matrix. Their parameters become views of it, so it costs no memory."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.weight = _joined([part.weight for part in parts]).t()
        self.ranks: Ranks = getattr(parts[0], "ranks", ALONE)  # whose outputs are summed
        biases = [part.bias for part in parts]
        self.bias = None if biases[0] is None else _joined(biases)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """x (T, D) -> out (T, E)."""
        if self.bias is None:
            torch.mm(x, self.weight, out=out)
        else:
            torch.addmm(self.bias, x, self.weight, out=out)

    def added(self, base: Tensor, x: Tensor) -> Tensor:
        """base (T, E) plus the layer's output."""
        if self.ranks.size > 1:
            result = self.ranks.sum(torch.mm(x, self.weight)).add_(base)
        else:
            result = torch.addmm(base, x, self.weight)
        return result if self.bias is None else result.add_(self.bias)


class Apart:
    """Quantised linear layers with one input, each by itself: their packed weights cannot be joined."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = [(part.weight.detach(), part.bias) for part in parts]

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """x (T, D) -> out (T, E)."""
        torch.cat([F.linear(x, weight, bias) for weight, bias in self.parts], -1, out=out)

    def added(self, base: Tensor, x: Tensor) -> Tensor:
        """base (T, E) plus the layer's output."""
        return base + torch.cat([F.linear(x, weight, bias) for weight, bias in self.parts], -1)


def _linear(parts: Sequence[Any]) -> Joined | Apart:
    return Apart(parts) if is_quantised(parts[0].weight) else Joined(parts)


def _joined(parts: Sequence[nn.Parameter]) -> Tensor:
    """The parts along the first dimension. Parts that were joined before lie one after the other already."""
    first, total = parts[0].detach(), sum(len(part) for part in parts)
    if len(parts) == 1:
        return first
    stored = first.untyped_storage()
    at = first.storage_offset()
    neighbours = True
    for part in parts:
        neighbours &= part.untyped_storage().data_ptr() == stored.data_ptr() and part.storage_offset() == at
        neighbours &= part.is_contiguous()
        at += part.numel()
    if neighbours:
        return first.as_strided((total, *first.shape[1:]), first.stride())
    joined = torch.cat([part.detach() for part in parts])
    for part, piece in zip(parts, torch.split(joined, [len(part) for part in parts]), strict=True):
        part.data = piece
    return joined
