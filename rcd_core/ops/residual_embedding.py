"""Input embeddings with sparse residuals (Eq. 1 and 2), as one operation with one gradient table.

With separate lookups autograd fills a (V, D) table for each of them (the tokens, the kept entries, the tail's sum over
the vocabulary) and adds them up. Here there is one table: it starts from the tail's part, which is equal for all rows,
and the rest is added to a few of its rows.

Shapes: T tokens, N masked positions in row-major order, K kept entries, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rcd_core.precision import at_least_fp32, reduction_dtype


@dataclass(frozen=True)
class SparseResidual:
    """Residuals of masked positions as weights on rows of the embedding table E.

    delta_n = sum_k weights[n, k] E[ids[n, k]] + tail[n] * sum_v E[v]. alpha (N,), ids (N, K) int, weights (N, K) and
    tail (N,); fp32 and without gradient, except for a learned alpha.
    """

    alpha: Tensor
    ids: Tensor
    weights: Tensor
    tail: Tensor

    def scaled(self, factor: Tensor) -> SparseResidual:
        """With alpha multiplied by (N,) factors: residual dropout."""
        return replace(self, alpha=self.alpha * factor)


def residual_embedding(ids: Tensor, masked: Tensor, table: Tensor, residual: SparseResidual) -> Tensor:
    """ids (...) -> (..., D): E[ids], and (1 - alpha) E[ids] + alpha delta where `masked` (...) is True.

    Differentiable in table (V, D), and in alpha if that requires a gradient. The result has the table's dtype; sums
    over the vocabulary and into the gradient table are fp32 or wider.
    """
    flat = masked.flatten().nonzero()[:, 0]
    alpha = at_least_fp32(residual.alpha)
    result: Tensor = _ResidualEmbedding.apply(  # type: ignore[no-untyped-call]
        table, ids.flatten(), flat, alpha, residual.ids.long(), residual.weights, residual.tail
    )
    return result.view(*ids.shape, table.shape[1])


class _ResidualEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, ids: Tensor, at: Tensor, alpha: Tensor, kept: Tensor, weights: Tensor, tail: Tensor
    ) -> Tensor:
        """at (N,): indices of the masked positions among ids (T,)."""
        # The table is needed only for alpha's gradient, which contains delta.
        ctx.save_for_backward(ids, at, alpha, kept, weights, tail, table if ctx.needs_input_grad[3] else None)
        ctx.shape, ctx.dtype = table.shape, table.dtype
        out = F.embedding(ids, table)
        blended = (1.0 - alpha)[:, None] * at_least_fp32(out[at])
        blended += _mixture(table, kept, weights * alpha[:, None], tail * alpha)
        # With alpha = 0 the mask's embedding stays, bit for bit.
        out[at] = torch.where((alpha > 0)[:, None], blended.to(out.dtype), out[at])
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        ids, at, alpha, kept, weights, tail, table = ctx.saved_tensors
        grad = at_least_fp32(upstream[0])
        g = grad[at]
        alpha_grad = None
        if table is not None:  # d input / d alpha = delta - E[x]
            delta, embeds = _mixture(table, kept, weights, tail), at_least_fp32(F.embedding(ids[at], table))
            alpha_grad = (g * (delta - embeds)).sum(1)
        weights, tail = weights * alpha[:, None], tail * alpha
        table_grad = (tail[:, None] * g).sum(0).expand(ctx.shape).contiguous()
        table_grad.index_add_(0, ids, grad.index_copy(0, at, (1.0 - alpha)[:, None] * g))
        for column in range(kept.shape[1]):  # one (N, K, D) tensor would be the step's largest
            table_grad.index_add_(0, kept[:, column], weights[:, column, None] * g)
        return table_grad.to(ctx.dtype), None, None, alpha_grad, None, None, None


def _mixture(table: Tensor, kept: Tensor, weights: Tensor, tail: Tensor) -> Tensor:
    """(N, D), fp32 or wider: sum_k weights[n, k] E[kept[n, k]] + tail[n] * sum_v E[v]."""
    few = F.embedding_bag(kept, table, per_sample_weights=weights.to(table.dtype), mode="sum")
    return tail[:, None] * table.sum(0, dtype=reduction_dtype(table.dtype)) + at_least_fp32(few)
