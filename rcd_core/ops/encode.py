"""Logits to sparse signals: the k largest entries, the entropy, and the mass of the tail.

Everything follows from sums over x = (z - max z) / T, each taken over the entries that are NOT kept; the few kept ones
are added separately. No difference of nearly equal numbers occurs, so a tail or an entropy of 1e-8 keeps fp32's
relative accuracy:

    Z = 1 + rest,   rest = sum over all but the largest of e^x      ln Z = log1p(rest)
    H = ln Z - (sum of x e^x) / Z                                   both terms are >= 0
    tail = (sum over what is not kept of e^x) / Z                   = exp(logsumexp(not kept) - logsumexp(all))

`tail_sums_plain` is the reference implementation. `tail_sums_fused` computes the same without a scatter, which
torch.compile turns into one pass over the logits. CUDA runs the compiled one (TORCH_COMPILE_DISABLE=1 turns it off),
other devices the plain one, on pieces that fit a core's cache.

Shapes: N positions, K kept entries, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from rcd_core.ops.top_k import top_k
from rcd_core.precision import at_least_fp32

LOWEST = -104.0  # e^-104 is 0 in fp32: clamping x to it keeps 0 * -inf out of the sums
_PIECE_BYTES = 2 << 20  # fp32 logits reduced at once on a CPU, about a second-level cache

TailSums = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


class Encoded(NamedTuple):
    """ids (N, K) int64 and log-probabilities (N, K) in descending order, from the full softmax at the delta
    temperature; tail (N,) the mass of all other ids; entropy (N,) in nats and confidence (N,), the largest probability,
    at the alpha temperature; peak (N,) the largest logit, NaN if the row holds NaN."""

    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    entropy: Tensor
    confidence: Tensor
    peak: Tensor


def encode(
    logits: Tensor, k: int, alpha_temperature: float, delta_temperature: float, tail_sums: TailSums | None = None
) -> Encoded:
    """(N, V) logits of any float dtype, N >= 1; they are not changed. k <= V. `tail_sums` overrides the choice by
    device. Rows without a finite peak give NaN, which the caller detects by `peak`."""
    rows = logits.shape[0] if logits.is_cuda else max(1, _PIECE_BYTES // (4 * logits.shape[1]))
    fused = logits.is_cuda and not torch.are_deterministic_algorithms_enabled()
    chosen = tail_sums or (_compiled() if fused else tail_sums_plain)
    parts = [encode_tile(z, k, alpha_temperature, delta_temperature, chosen) for z in torch.split(logits, rows)]
    return parts[0] if len(parts) == 1 else Encoded(*(torch.cat(column) for column in zip(*parts, strict=True)))


def encode_tile(
    z: Tensor,
    k: int,
    alpha_temperature: float,
    delta_temperature: float,
    tail_sums: TailSums,
    find: Callable[[Tensor, int], tuple[Tensor, Tensor]] = top_k,
) -> Encoded:
    """`encode` of logits that are reduced at once. find: the k largest entries."""
    if not z.is_cuda:
        z = at_least_fp32(z)  # on CUDA the compiled sums read bf16 directly
    top, ids = find(z, k)
    top = at_least_fp32(top)
    tail, dot = tail_sums(z, top, ids, delta_temperature)
    x, z_sum, log_sum = _kept(top, tail, delta_temperature)
    logprobs, tail_mass = x - log_sum[:, None], tail / z_sum
    if alpha_temperature != delta_temperature:
        tail, dot = tail_sums(z, top, ids, alpha_temperature)
        x, z_sum, log_sum = _kept(top, tail, alpha_temperature)
    x = x.clamp(min=LOWEST)
    entropy = log_sum - (dot + (x * x.exp()).sum(1)) / z_sum
    return Encoded(ids, logprobs, tail_mass, entropy, (-log_sum).exp(), top[:, 0])


def _kept(top: Tensor, tail: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """x of the kept entries (N, K), Z (N,) and ln Z (N,)."""
    x = (top - top[:, :1]) / temperature
    rest = tail + x[:, 1:].exp().sum(1)
    return x, 1.0 + rest, torch.log1p(rest)


def tail_sums_plain(z: Tensor, top: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sums of e^x and of x e^x over the entries that are not kept: 2 x (N,)."""
    x = at_least_fp32(z) - top[:, :1]
    if temperature != 1.0:
        x /= temperature
    e = x.exp().scatter_(1, ids, 0.0)
    tail, dot = e.sum(1), e.mul_(x).sum(1)
    if dot.isnan().any():  # -inf logits, for example of padded vocabularies; too rare to clamp always
        dot = x.clamp_(min=LOWEST).exp().scatter_(1, ids, 0.0).mul_(x).sum(1)
    return tail, dot


def tail_sums_fused(z: Tensor, top: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same sums. Not kept are the entries below the smallest kept one, and those of its equals beyond the k."""
    del ids
    return rest_sums(sums_below(z, top, temperature), top, temperature)


def sums_below(z: Tensor, top: Tensor, temperature: float) -> Tensor:
    """(3, N): over the entries below the smallest kept one the sums of e^x and of x e^x, and the number of its
    equals. They may be added up over parts of the vocabulary."""
    peak, least = top[:, :1], top[:, -1:]
    z = at_least_fp32(z)
    x = ((z - peak) / temperature).clamp(min=LOWEST)
    e = torch.where(z < least, x.exp(), 0.0)
    return torch.stack([e.sum(1), (e * x).sum(1), (z == least).sum(1).to(z.dtype)])


def rest_sums(below: Tensor, top: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What `tail_sums_fused` returns, from `sums_below` of the whole vocabulary."""
    least = top[:, -1:]
    x_least = ((least - top[:, :1]) / temperature).clamp(min=LOWEST)[:, 0]
    e_least = (below[2] - (top == least).sum(1)) * x_least.exp()
    return below[0] + e_least, below[1] + e_least * x_least


@cache
def _compiled() -> TailSums:
    compiled: TailSums = torch.compile(tail_sums_fused)
    return compiled
