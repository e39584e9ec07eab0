"""The residual of RCD, Eq. 1 and 2 of arXiv 2601.22954v2. Alpha is in alpha.py.

Shapes: N positions, V vocabulary, D embedding width. E: (V, D), the target's own input embedding table.
"""

from __future__ import annotations

from torch import Tensor


def soft_embedding(probs: Tensor, embedding_weight: Tensor) -> Tensor:
    """Eq. 1: (N, V) probabilities, (V, D) table -> (N, D) delta, with gradient to the table."""
    return probs.to(embedding_weight.dtype) @ embedding_weight


def inject_residual(embeds: Tensor, mask: Tensor, alpha: Tensor, delta: Tensor, mask_embedding: Tensor) -> Tensor:
    """Eq. 2: (..., D) token embeddings -> inputs, (1 - alpha) E[M] + alpha delta where `mask` is True.

    mask (...) bool with N True entries; alpha (N,) and delta (N, D) in their order; mask_embedding (D,) or (N, D).
    """
    alpha = alpha.to(embeds.dtype).unsqueeze(-1)
    blended = (1.0 - alpha) * mask_embedding + alpha * delta.to(embeds.dtype)
    return embeds.masked_scatter(mask.unsqueeze(-1), blended)
