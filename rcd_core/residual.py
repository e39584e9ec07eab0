"""The residual of RCD, Eq. 1 and 2 of arXiv 2601.22954v2, and how a target is trained with it. Alpha is in alpha.py.

Shapes: N positions, V vocabulary, D embedding width. E: (V, D), the target's own input embedding table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from rcd_core.decode_settings import AlphaRule
from rcd_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ResidualSettings:
    """How a target is trained with residuals.

    source: "signals" (cached reference signals), "online" (the reference runs inside the step), "none" (plain masked
    SFT) or "self" (no reference: one or two passes of the target itself on nested, noisier inputs). Two are controls of
    experiments: "self_same" (self-residual on the same input) and "on_policy" (no residual, but masks as the target's
    own passes leave them).
    alpha_scale: nats, for the rules calibrated_entropy, uniform and learned; None takes `alpha_quantile` of the
    signals' entropies. top_k: ids of the signals that are used, None for all; the rest joins the tail.
    dropout: share of samples that are trained with alpha = 0, an extension for the zero start; the paper has 0.
    """

    __pydantic_config__ = {"extra": "forbid"}

    source: Literal["signals", "online", "none", "self", "self_same", "on_policy"] = "signals"
    alpha: AlphaRule = "normalized_entropy"
    alpha_scale: float | None = None
    alpha_quantile: float = 0.999
    top_k: int | None = None
    dropout: float = 0.25

    @property
    def feeds_back(self) -> bool:
        """Whether the model learns to read residuals, so that decoding it with residuals makes sense."""
        return self.source not in ("none", "on_policy")

    @property
    def learns_alpha(self) -> bool:
        return self.feeds_back and self.alpha == "learned"

    @property
    def runs_model(self) -> bool:
        """Whether a step first runs the model in training on other inputs."""
        return self.source in ("self", "self_same", "on_policy")

    def without_dropout(self) -> ResidualSettings:
        return replace(self, dropout=0.0)

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout <= 1.0:
            raise UserError(f"residual.dropout is {self.dropout}; it must lie in [0, 1]")
        if self.alpha_scale is not None and not self.alpha_scale > 0.0:
            raise UserError(f"residual.alpha_scale is {self.alpha_scale}; it must be above 0 (nats)")
        if not 0.0 < self.alpha_quantile <= 1.0:
            raise UserError(f"residual.alpha_quantile is {self.alpha_quantile}; it must lie in (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"residual.top_k is {self.top_k}; it must be at least 1, or null for all ids")
        if self.alpha == "ramp":
            raise UserError("residual.alpha is 'ramp', which depends on the pass number; train with another rule")


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
