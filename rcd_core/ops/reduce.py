"""A tile of logits to tokens, confidence, entropy and the next residual, in few passes over the logits.

Greedy decoding needs only ln p = log_softmax(z): token and confidence are its largest entry outside the mask's column,
H = -sum p ln p (Eq. 3), delta = p E (Eq. 1).

Shapes: N masked positions of the tile, V vocabulary, K kept entries, D width. E: (V, D) input embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rcd_core.alpha import LearnedAlpha, alpha_from_statistics
from rcd_core.decode_settings import AlphaRule
from rcd_core.ops.encode import LOWEST, Encoded, encode
from rcd_core.ops.top_k import largest
from rcd_core.precision import at_least_fp32, reduction_dtype


@dataclass(frozen=True)
class Feedback:
    """How a prediction becomes a residual; requests with equal Feedback share one reduction. rule: one that depends on
    the position only. top_k: delta from so many entries, with the tail's mass on the mean of the others; None: all."""

    rule: AlphaRule
    alpha_scale: float | None
    alpha_temperature: float
    delta_temperature: float
    top_k: int | None

    @property
    def kept(self) -> int | None:
        """top_k where delta needs it."""
        return None if self.rule == "top1" else self.top_k


class Reduced(NamedTuple):
    """tokens (N,) int64, never the mask. confidence (N,), the token's probability, and entropy (N,) in nats (0 if not
    requested), both of the whole prediction. alpha (N,) and delta (N, D) if there is feedback."""

    tokens: Tensor
    confidence: Tensor
    entropy: Tensor
    alpha: Tensor | None = None
    delta: Tensor | None = None


def reduce_greedy(
    logits: Tensor, mask_token_id: int, feedback: Feedback | None, table: Table, with_entropy: bool = True
) -> Reduced:
    """(N, V) logits, fp32 or wider -> Reduced, computed in their dtype. No host synchronisation."""
    if feedback is None:
        return _plain(logits, mask_token_id, with_entropy)
    if feedback.kept is not None:
        k = min(feedback.kept, logits.shape[1])
        encoded = encode(logits, k, feedback.alpha_temperature, feedback.delta_temperature)
        return reduce_encoded(encoded, mask_token_id, feedback, table, lambda: _plain(logits, mask_token_id, True))
    return _dense(logits, mask_token_id, feedback, table)


class Table:
    """The weights that make residuals: the embedding table, the sum of its rows, which is computed once because weights
    do not change while decoding, and the network of a learned alpha."""

    def __init__(self, weight: Tensor, learned: LearnedAlpha | None = None) -> None:
        self.weight, self.learned = weight, learned
        self._sum: Tensor | None = None

    @property
    def sum(self) -> Tensor:
        if self._sum is None:
            self._sum = self.weight.sum(0, dtype=reduction_dtype(self.weight.dtype))
        return self._sum

    @property
    def vocab_size(self) -> int:
        return len(self.weight)

    def mixture(self, ids: Tensor, weights: Tensor, share: Tensor) -> Tensor:
        """(N, D), fp32 or wider: sum_k weights[n, k] E[ids[n, k]] + share[n] * sum_v E[v]."""
        few = F.embedding_bag(ids, self.weight, per_sample_weights=weights.to(self.weight.dtype), mode="sum")
        return at_least_fp32(few) + share[:, None] * self.sum


def _plain(z: Tensor, mask_token_id: int, with_entropy: bool) -> Reduced:
    logp = torch.log_softmax(z, -1)
    entropy = _entropy(logp.exp(), logp) if with_entropy else z.new_zeros(len(z))
    return Reduced(*_best(logp, mask_token_id), entropy)


def _best(logp: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """The most probable token other than the mask, and its probability. Overwrites the mask's column."""
    logp.select(1, mask_token_id).fill_(float("-inf"))
    best, tokens = largest(logp)
    return tokens, best.exp()


def _dense(z: Tensor, mask_token_id: int, feedback: Feedback, table: Table) -> Reduced:
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    entropy = _entropy(p, logp)
    tempered, tempered_entropy = p, entropy
    if feedback.alpha_temperature != 1.0:
        log_tempered = torch.log_softmax(logp / feedback.alpha_temperature, -1)
        tempered = log_tempered.exp()
        tempered_entropy = _entropy(tempered, log_tempered)
    alpha = alpha_from_statistics(
        feedback.rule, tempered_entropy, tempered.amax(-1), z.shape[1], feedback.alpha_scale, learned=table.learned
    )
    if feedback.rule == "top1":
        delta = table.weight[largest(p)[1]]
    else:
        if feedback.delta_temperature != 1.0:
            same = feedback.delta_temperature == feedback.alpha_temperature
            p = tempered if same else torch.softmax(logp / feedback.delta_temperature, -1)
        delta = p.to(table.weight.dtype) @ table.weight
    return Reduced(*_best(logp, mask_token_id), entropy, alpha, delta)


def _entropy(p: Tensor, logp: Tensor) -> Tensor:
    """Clamps `logp` in place to e^-104, which is 0 in fp32, so that 0 ln 0 is 0."""
    entropy: Tensor = -torch.linalg.vecdot(p, logp.clamp_(min=LOWEST))
    return entropy


def reduce_encoded(
    encoded: Encoded, mask_token_id: int, feedback: Feedback, table: Table, plain: Callable[[], Reduced]
) -> Reduced:
    """encoded: K entries of each prediction. plain: the reduction without feedback, where they do not give it."""
    p, k = encoded.logprobs.exp(), encoded.ids.shape[1]
    if k > 1 and feedback.alpha_temperature == feedback.delta_temperature == 1.0:
        mask_first = encoded.ids[:, 0] == mask_token_id  # then the second largest is the largest that may be chosen
        tokens, confidence = (torch.where(mask_first, c[:, 1], c[:, 0]) for c in (encoded.ids, p))
        reduced = Reduced(tokens, confidence, encoded.entropy)
    else:
        reduced = plain()
    alpha = alpha_from_statistics(
        feedback.rule,
        encoded.entropy,
        encoded.confidence,
        table.vocab_size,
        feedback.alpha_scale,
        learned=table.learned,
    )
    share = encoded.tail / max(1, table.vocab_size - k)
    return Reduced(*reduced[:3], alpha, table.mixture(encoded.ids, p - share[:, None], share))
