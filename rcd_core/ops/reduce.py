"""A tile of logits to what decoding takes from it: tokens, confidence, entropy and the next residual, in few passes.

Everything greedy decoding needs follows from ln p = log_softmax(z): the token is its argmax beside the mask's column,
the confidence its largest entry there, H = -sum p ln p, delta = p E.

Shapes: N masked positions of the tile, V vocabulary, K kept entries, D width. E: (V, D) input embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rcd_core.alpha import LearnedAlpha, alpha_from_statistics
from rcd_core.decode_settings import AlphaRule
from rcd_core.ops.encode import LOWEST, encode


@dataclass(frozen=True)
class Feedback:
    """How the residual follows from a prediction; requests alike in this share one reduction. rule: one that looks at
    the position alone. top_k None: delta over the whole vocabulary, else over the top_k largest with the rest on the
    mean of the others."""

    rule: AlphaRule
    alpha_scale: float | None
    alpha_temperature: float
    delta_temperature: float
    top_k: int | None


class Reduced(NamedTuple):
    """tokens (N,) int64, never the mask; confidence (N,), the token's probability; entropy (N,) in nats, both of the
    whole prediction, the latter 0 where nobody asked; alpha (N,) and delta (N, D) where there is feedback."""

    tokens: Tensor
    confidence: Tensor
    entropy: Tensor
    alpha: Tensor | None = None
    delta: Tensor | None = None


def reduce_greedy(
    logits: Tensor, mask_token_id: int, feedback: Feedback | None, table: Table, with_entropy: bool = True
) -> Reduced:
    """(N, V) fp32 logits. No host synchronisation."""
    if feedback is None:
        return _plain(logits, mask_token_id, with_entropy)
    if feedback.top_k is not None and feedback.rule != "top1":
        return _sparse(logits, mask_token_id, feedback, table)
    return _dense(logits, mask_token_id, feedback, table)


class Table:
    """The weights that residuals are made with: the embedding table, the network of a learned alpha, and the sum of the
    table's rows, which is made once: weights do not change while decoding."""

    def __init__(self, weight: Tensor, learned: LearnedAlpha | None = None) -> None:
        self.weight, self.learned = weight, learned
        self._sum: Tensor | None = None

    @property
    def sum(self) -> Tensor:
        if self._sum is None:
            self._sum = self.weight.sum(0, dtype=torch.float32)
        return self._sum


def _plain(z: Tensor, mask_token_id: int, with_entropy: bool) -> Reduced:
    logp = torch.log_softmax(z, -1)
    entropy = _entropy(logp.exp(), logp) if with_entropy else z.new_zeros(len(z))
    return Reduced(*_best(logp, mask_token_id), entropy)


def _best(logp: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """The token beside the mask with the largest log-probability, and its probability. The mask's column is lost."""
    logp.select(1, mask_token_id).fill_(float("-inf"))
    best, tokens = logp.max(-1)
    return tokens, best.exp()


def _dense(z: Tensor, mask_token_id: int, feedback: Feedback, table: Table) -> Reduced:
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    entropy = _entropy(p, logp)
    warm, own_entropy = p, entropy
    if feedback.alpha_temperature != 1.0:
        log_warm = torch.log_softmax(logp / feedback.alpha_temperature, -1)
        warm = log_warm.exp()
        own_entropy = _entropy(warm, log_warm)
    alpha = alpha_from_statistics(
        feedback.rule, own_entropy, warm.amax(-1), z.shape[1], feedback.alpha_scale, learned=table.learned
    )
    if feedback.rule == "top1":
        delta = table.weight[p.argmax(-1)]
    else:
        if feedback.delta_temperature != 1.0:
            same = feedback.delta_temperature == feedback.alpha_temperature
            p = warm if same else torch.softmax(logp / feedback.delta_temperature, -1)
        delta = p.to(table.weight.dtype) @ table.weight
    return Reduced(*_best(logp, mask_token_id), entropy, alpha, delta)


def _entropy(p: Tensor, logp: Tensor) -> Tensor:
    """0 ln 0 is 0: what is below e^-104, 0 in fp32, is raised to it. `logp` is changed there."""
    found: Tensor = -torch.linalg.vecdot(p, logp.clamp_(min=LOWEST))
    return found


def _sparse(z: Tensor, mask_token_id: int, feedback: Feedback, table: Table) -> Reduced:
    assert feedback.top_k is not None
    k = min(feedback.top_k, z.shape[1])
    found = encode(z, k, feedback.alpha_temperature, feedback.delta_temperature)
    p = found.logprobs.exp()
    if k > 1 and feedback.alpha_temperature == feedback.delta_temperature == 1.0:
        other = found.ids[:, 0] == mask_token_id  # then the second largest is the largest that may be chosen
        tokens, confidence = (torch.where(other, c[:, 1], c[:, 0]) for c in (found.ids, p))
        reduced = Reduced(tokens, confidence, found.entropy)
    else:
        reduced = _plain(z, mask_token_id, True)
    alpha = alpha_from_statistics(
        feedback.rule, found.entropy, p[:, 0], z.shape[1], feedback.alpha_scale, learned=table.learned
    )
    share = found.tail / max(1, z.shape[1] - k)
    weights = (p - share[:, None]).to(table.weight.dtype)
    delta = F.embedding_bag(found.ids, table.weight, per_sample_weights=weights, mode="sum").float()
    return Reduced(*reduced[:3], alpha, delta + share[:, None] * table.sum)
