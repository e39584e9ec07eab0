"""The residual of RCD, Eq. 1-3 of arXiv 2601.22954v2, and the rules that turn uncertainty into alpha.

Shapes: N positions, V vocabulary, D embedding width. E: (V, D) the TARGET's own input embedding table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from rcd_core.alpha import AlphaRule as AlphaRule
from rcd_core.errors import UserError
from rcd_core.learned_alpha import LearnedAlpha

FIXED_ALPHA = 0.3


@dataclass(frozen=True, kw_only=True)
class ResidualSettings:
    """How a target is trained with residuals.

    source: "signals" cached reference signals, "online" the reference inside the step, "none" plain masked SFT; without
    a reference: "self" the target's own one or two passes on nested noisier inputs, "self_same" on the same input (the
    weak control), "on_policy" no residual but masks as the target's passes leave them (the other control).
    alpha_scale: h of calibrated_entropy, uniform and learned in nats; None takes `alpha_quantile` of the signals'
    entropies. top_k: only so many of the ids that the signals keep, the others join the tail; None: all of them.
    dropout: share of samples trained with alpha = 0 (experiments: lifts the zero start; 0 is the paper's form).
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
        """The model learns to read residuals: decoding it with them makes sense."""
        return self.source not in ("none", "on_policy")

    @property
    def learns_alpha(self) -> bool:
        return self.feeds_back and self.alpha == "learned"

    @property
    def runs_model(self) -> bool:
        """The model under training itself is run on other inputs first."""
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
            raise UserError(f"residual.top_k is {self.top_k}; it must be at least 1, or null for all that is kept")
        if self.alpha == "ramp":
            raise UserError("residual.alpha is 'ramp', which counts decoding's passes; train with another rule")


def entropy(logits: Tensor) -> Tensor:
    """(N, V) logits -> (N,) entropy in nats of softmax(logits). A -inf logit contributes nothing."""
    logp = torch.log_softmax(logits, dim=-1)
    p = logp.exp()
    return -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)


def alpha_from_statistics(
    rule: AlphaRule,
    entropy_n: Tensor,
    confidence_n: Tensor,
    vocab_size: int,
    alpha_scale: float | None = None,
    *,
    learned: LearnedAlpha | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """(N,) entropies in nats and (N,) top probabilities -> (N,) alpha in [0, 1]; Eq. 3 and its variants.

    learned: the network of the rule "learned". groups (N,): which block each position is of, for "uniform", whose
    alpha is the mean over a block's masked positions of H / alpha_scale, or of H / ln V where no scale is given: the
    weight in all is the method's, only where it goes differs. None: all positions are of one block.
    """
    if rule not in get_args(AlphaRule):
        raise UserError(f"alpha is {rule!r}; allowed: {', '.join(get_args(AlphaRule))}")
    if rule == "calibrated_entropy":
        if alpha_scale is None:
            raise UserError(
                "alpha is 'calibrated_entropy' but no alpha_scale is set and the checkpoint stores none; "
                "set alpha_scale (nats), or use alpha='normalized_entropy'"
            )
        return (entropy_n / alpha_scale).clamp(0.0, 1.0)
    if rule == "ramp":
        raise UserError("alpha is 'ramp', which follows from the number of the pass; it is for decoding only")
    if rule in ("uniform", "learned"):
        share = (entropy_n / (alpha_scale or math.log(vocab_size))).clamp(0.0, 1.0)
        if rule == "uniform":
            return group_mean(share, groups)
        if learned is None:
            raise UserError("alpha is 'learned' but the model has not learned one; use a rule it was trained with")
        alpha: Tensor = learned(share, confidence_n)
        return alpha
    normalized = (entropy_n / math.log(vocab_size)).clamp(0.0, 1.0)
    if rule in ("normalized_entropy", "top1"):
        return normalized
    if rule == "inverse_entropy":
        return 1.0 - normalized
    if rule == "confidence":
        return confidence_n
    if rule == "inverse_confidence":
        return 1.0 - confidence_n
    return torch.full_like(entropy_n, FIXED_ALPHA if rule == "fixed" else 1.0)


def group_mean(values: Tensor, groups: Tensor | None) -> Tensor:
    """(N,) values, (N,) int group numbers -> (N,) the mean of each value's group; None: of all."""
    if groups is None:
        return values.mean().expand_as(values)
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    sums = values.new_zeros(len(counts)).index_add_(0, index, values)
    means: Tensor = sums / counts
    return means[index]


def entropy_weight(
    logits: Tensor,
    rule: AlphaRule = "normalized_entropy",
    *,
    temperature: float = 1.0,
    alpha_scale: float | None = None,
) -> Tensor:
    """(N, V) logits -> (N,) alpha (Eq. 3; `temperature` is T_res of Algorithm 2)."""
    scaled = logits / temperature
    confidence = torch.softmax(scaled, dim=-1).amax(-1)
    return alpha_from_statistics(rule, entropy(scaled), confidence, logits.shape[-1], alpha_scale)


def soft_embedding(probs: Tensor, embedding_weight: Tensor) -> Tensor:
    """Eq. 1: (N, V) probabilities, (V, D) table -> (N, D) delta, with gradient to the table."""
    return probs.to(embedding_weight.dtype) @ embedding_weight


def inject_residual(embeds: Tensor, mask: Tensor, alpha: Tensor, delta: Tensor, mask_embedding: Tensor) -> Tensor:
    """Eq. 2: (..., D) token embeddings -> inputs with (1 - alpha) E[M] + alpha delta where `mask` is True.

    mask: (...) bool with N True entries; alpha (N,), delta (N, D) in their order; mask_embedding (D,) or (N, D).
    """
    alpha = alpha.to(embeds.dtype).unsqueeze(-1)
    blended = (1.0 - alpha) * mask_embedding + alpha * delta.to(embeds.dtype)
    return embeds.masked_scatter(mask.unsqueeze(-1), blended)
