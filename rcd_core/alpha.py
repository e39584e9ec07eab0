"""Alpha, the weight of the residual: Eq. 3 of arXiv 2601.22954v2, its variants, and the network of the rule "learned".

Shapes: N masked positions, V vocabulary.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor, nn

from rcd_core.decode_settings import AlphaRule, DecodeSettings
from rcd_core.errors import UserError
from rcd_core.precision import at_least_fp32

FIXED_ALPHA = 0.3
HIDDEN_WIDTH = 16
LOGIT_MARGIN = 1e-3  # keeps logit(u) finite

# dInfer's IterSmooth (cont_weight_init, _growth, cont_weight) feeds embeddings back into models that were not trained
# for it. Here the count restarts at every block, so that a request can resume from its finished blocks.
RAMP_FIRST, RAMP_GROWTH, RAMP_MAX = 0.15, 0.02, 0.3


class LearnedAlpha(nn.Module):
    """alpha = sigmoid(logit(u) + f(u, c)) with u = min(1, H / alpha_scale), c = max p and f: 2 -> 16 -> 1.

    f starts as 0, so training starts from the calibrated rule. The initial weights are the same on every worker.
    """

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.hidden = nn.Linear(2, HIDDEN_WIDTH)
        self.out = nn.Linear(HIDDEN_WIDTH, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, uncertainty: Tensor, confidence: Tensor) -> Tensor:
        """u (N,) and top probabilities (N,), both in [0, 1] -> (N,) alpha, fp32 or wider."""
        features = torch.stack([uncertainty, confidence], -1).to(self.hidden.weight.dtype)  # bf16 if sharded so
        shift: Tensor = self.out(torch.tanh(self.hidden(features)))[:, 0]
        uncertainty = at_least_fp32(uncertainty)
        return torch.sigmoid(torch.logit(uncertainty, eps=LOGIT_MARGIN) + at_least_fp32(shift))


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
    """(N,) entropies in nats and (N,) top probabilities, both at T_res -> (N,) alpha in [0, 1]; Eq. 3 and its variants.

    learned: the network, for the rule "learned". groups (N,): block number of each position, for the rule "uniform";
    None means that all positions belong to one block. Raises UserError if the rule needs something that is missing.
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
        raise UserError("alpha is 'ramp', which depends on the pass number; it is for decoding only")
    if rule in ("uniform", "learned"):
        uncertainty = (entropy_n / (alpha_scale or math.log(vocab_size))).clamp(0.0, 1.0)
        if rule == "uniform":
            return group_mean(uncertainty, groups)
        if learned is None:
            raise UserError("alpha is 'learned' but the model has no learned network; use a rule it was trained with")
        alpha: Tensor = learned(uncertainty, confidence_n)
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


def position_rule(settings: DecodeSettings) -> AlphaRule:
    """The part of the rule that depends on one position only. `block_alpha` computes the rest of "uniform" and "ramp"
    after the pass has committed its tokens."""
    if settings.alpha == "uniform":
        return "normalized_entropy" if settings.alpha_scale is None else "calibrated_entropy"
    return "one" if settings.alpha == "ramp" else settings.alpha or "normalized_entropy"


def block_alpha(alpha: Tensor, groups: Tensor, ramp: Tensor) -> Tensor:
    """Alpha of the rules that depend on the whole block ("uniform") or on the pass number ("ramp").

    (N,) alpha by `position_rule`, (N,) request numbers, (N,) ramp weights, negative for "uniform" -> (N,) alpha.
    """
    return torch.where(ramp < 0, group_mean(alpha, groups), ramp)


def ramp_weight(step: int) -> float:
    """Control of an experiment: alpha in the input of pass `step` of a block, from 1. A start's residual (step 0) has
    the weight of step 1."""
    return min(RAMP_FIRST + RAMP_GROWTH * max(0, step - 1), RAMP_MAX)


def group_mean(values: Tensor, groups: Tensor | None) -> Tensor:
    """(N,) values and (N,) integer group numbers -> (N,) mean of each value's group. groups None: the mean of all.
    No host synchronisation."""
    if groups is None:
        return values.mean().expand_as(values)
    ordered, order = groups.sort()
    number = (ordered != ordered.roll(1)).long()
    number[:1] = 0
    index = torch.empty_like(order).scatter_(0, order, number.cumsum(0))  # groups numbered from 0
    zeros = values.new_zeros(len(values))
    counts = zeros.index_add(0, index, torch.ones_like(values))
    means: Tensor = zeros.index_add(0, index, values) / counts.clamp(min=1)
    return means[index]


def entropy(logits: Tensor) -> Tensor:
    """(N, V) logits -> (N,) entropy of softmax(logits) in nats. A logit of -inf contributes nothing."""
    logp = torch.log_softmax(logits, dim=-1)
    p = logp.exp()
    return -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)


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
