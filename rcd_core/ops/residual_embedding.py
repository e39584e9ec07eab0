"""Input embeddings with sparse residuals, as one operation with one gradient table.

Written as separate lookups, autograd fills a table of (V, D) numbers for each of them (the tokens, the kept entries,
the tail's sum over the vocabulary) and adds them up: at V = 151,936 that alone cost more than a layer. Here the tail's
part, equal for all rows, is what the one table starts from, in place of zeros; the rest is added to few of its rows.

Shapes: T tokens in all, N masked positions in row-major order, K kept entries, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SparseResidual:
    """What masked positions take in, as weights on rows of the embedding table (Eq. 1 and 2).

    alpha (N,); delta_n = sum_k weights[n, k] E[ids[n, k]] + tail[n] * sum_v E[v]; ids (N, K) int, weights (N, K),
    tail (N,), all fp32 and without gradient, but for alpha where it is learned.
    """

    alpha: Tensor
    ids: Tensor
    weights: Tensor
    tail: Tensor

    def scaled(self, factor: Tensor) -> SparseResidual:
        """With alpha multiplied by (N,) factors: residual dropout."""
        return replace(self, alpha=self.alpha * factor)


def residual_embedding(ids: Tensor, masked: Tensor, table: Tensor, residual: SparseResidual) -> Tensor:
    """(..., D) E[ids], and (1 - alpha) E[ids] + alpha delta where `masked` (...) is True; gradient to table (V, D),
    and to alpha if it has one.

    In the table's dtype; sums over the vocabulary and in the gradient table are made in fp32.
    """
    flat = masked.flatten().nonzero()[:, 0]
    alpha = residual.alpha.float()
    found: Tensor = _ResidualEmbedding.apply(  # type: ignore[no-untyped-call]
        table, ids.flatten(), flat, alpha, residual.ids.long(), residual.weights, residual.tail
    )
    return found.view(*ids.shape, table.shape[1])


class _ResidualEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, ids: Tensor, at: Tensor, alpha: Tensor, kept: Tensor, weights: Tensor, tail: Tensor
    ) -> Tensor:
        """at (N,): places of the masked positions among ids (T,)."""
        # The table only where alpha's gradient asks for delta once more.
        ctx.save_for_backward(ids, at, alpha, kept, weights, tail, table if ctx.needs_input_grad[3] else None)
        ctx.shape, ctx.dtype = table.shape, table.dtype
        out = F.embedding(ids, table)
        blended = (1.0 - alpha)[:, None] * out[at].float()
        blended += _mixture(table, kept, weights * alpha[:, None], tail * alpha)
        # alpha = 0 leaves the mask's embedding as it is, bit for bit.
        out[at] = torch.where((alpha > 0)[:, None], blended.to(out.dtype), out[at])
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        ids, at, alpha, kept, weights, tail, table = ctx.saved_tensors
        grad = upstream[0].float()
        g = grad[at]
        alpha_grad = None
        if table is not None:  # d input / d alpha = delta - E[x]
            alpha_grad = (g * (_mixture(table, kept, weights, tail) - F.embedding(ids[at], table).float())).sum(1)
        weights, tail = weights * alpha[:, None], tail * alpha
        found = (tail[:, None] * g).sum(0).expand(ctx.shape).contiguous()
        found.index_add_(0, ids, grad.index_copy(0, at, (1.0 - alpha)[:, None] * g))
        for column in range(kept.shape[1]):  # (N, K, D) would be the largest tensor of the step
            found.index_add_(0, kept[:, column], weights[:, column, None] * g)
        return found.to(ctx.dtype), None, None, alpha_grad, None, None, None


def _mixture(table: Tensor, kept: Tensor, weights: Tensor, tail: Tensor) -> Tensor:
    """(N, D) fp32: sum_k weights[n, k] E[kept[n, k]] + tail[n] * sum_v E[v]."""
    few = F.embedding_bag(kept, table, per_sample_weights=weights.to(table.dtype), mode="sum").float()
    return tail[:, None] * table.sum(0, dtype=torch.float32) + few
