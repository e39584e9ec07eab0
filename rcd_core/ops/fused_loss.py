"""Linear head and cross entropy fused, in chunks: no (N, V) tensor is held, and no product is computed twice.

The weights of the positions are known beforehand, and the backward pass receives a single number. So the forward pass
computes the gradients too, chunk by chunk, while it has the logits: three products per chunk, where recomputation needs
four.

Shapes: N masked positions, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rcd_core.ops.tiles import tile_rows
from rcd_core.precision import at_least_fp32, reduction_dtype


def weighted_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    chunk_rows: int | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum_i weights_i * loss_i, loss (N,)) with loss_i = -log softmax(hidden_i W^T)[labels_i], both fp32 or wider.

    teacher: (hidden states (N, D'), head (V, D')) of a model whose distributions take the labels' place, with loss_i =
    -sum_v softmax(teacher_i)[v] log softmax(hidden_i W^T)[v]; no gradient reaches it.
    The sum is differentiable in hidden and head_weight; the losses are not. hidden (N, D), head_weight (V, D), labels
    (N,) int64, weights (N,). Products run in hidden's dtype or autocast's, reductions in fp32 or wider. N = 0 gives 0.
    chunk_rows: rows per chunk, by default as many as the device takes well (ops/tiles.py).
    """
    rows = chunk_rows or tile_rows(head_weight.shape[0], hidden.device)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    result: tuple[Tensor, Tensor] = _WeightedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, head_weight, labels, at_least_fp32(weights), rows, dtype, *(teacher or (None, None))
    )
    return result


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        rows: int,
        dtype: torch.dtype,
        teacher: Tensor | None,
        teacher_head: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        head, sums = head_weight.to(dtype), reduction_dtype(dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Accumulated in fp32 or wider, so that many chunks lose no precision in bf16.
        grad_head = torch.zeros_like(head_weight, dtype=sums) if needs_head else None
        losses = torch.empty(hidden.shape[0], dtype=sums, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            h, y, w = hidden[part].to(dtype), labels[part, None], weights[part]
            logits = at_least_fp32(h @ head.T)
            norm = logits.logsumexp(-1)
            target = None
            if teacher is None or teacher_head is None:
                losses[part] = norm - logits.gather(1, y)[:, 0]
            else:
                target = at_least_fp32(teacher[part].to(dtype) @ teacher_head.to(dtype).T).softmax(-1)
                losses[part] = norm - (target * logits).sum(-1)
            if grad_hidden is None and grad_head is None:
                continue
            # d loss / d logits = w (softmax - onehot or the teacher's), in place.
            grad = logits.sub_(norm[:, None]).exp_()
            if target is None:
                grad.scatter_add_(1, y, torch.full_like(y, -1, dtype=grad.dtype))
            else:
                grad.sub_(target)
            grad = grad.mul_(w[:, None]).to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] = (grad @ head).to(hidden.dtype)
            if grad_head is not None:
                if dtype == sums:
                    grad_head.addmm_(grad.T, h)
                else:
                    grad_head += grad.T @ h
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head_weight.dtype))
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g.mul_(upstream[0].to(g.dtype)) for g in ctx.saved_tensors]
        return scaled[0], scaled[1], None, None, None, None, None, None
