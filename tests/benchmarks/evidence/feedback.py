"""Other ways to feed predictions back, for the experiment only: the package's own functions are replaced meanwhile.

- restored_norm: delta keeps the norm that its tokens have on average, sum_k p_k |E_k|, as DMax does with its soft
  embeddings. The mean of several embeddings is shorter than each.
- soft_masked: of the k most probable tokens, whose probabilities are made to sum to 1, as in soft-masked diffusion.
  alpha = scale * sigmoid(steep * (-H - centre)) grows with certainty; scale, centre and steep are learned.

Shapes: N positions, K kept tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcd_core.ops import reduce
from rcd_core.signals import ReferenceSignals
from rcd_core.training import loop, own_signals

SOFT_TOP_K = 3
_FASTER = 5.0  # the three numbers have a learning rate of 0.01, the targets of the experiment 0.002


@contextmanager
def feedback(name: str | None) -> Iterator[None]:
    """name: one of `KINDS`, or None for the package's own."""
    with ExitStack() as stack:
        for owner, attribute, function in KINDS[name]() if name else []:
            stack.enter_context(mock.patch.object(owner, attribute, function))
        yield


# -- delta with its norm restored
def _restored_norm() -> list[tuple[Any, str, Any]]:
    mixture, soft_embedding = reduce.Table.mixture, ReferenceSignals.soft_embedding

    def decoding(table: reduce.Table, ids: Tensor, weights: Tensor, share: Tensor) -> Tensor:
        return restored(mixture(table, ids, weights, share), table.weight, ids, weights, share)

    def training(signals: ReferenceSignals, embedding_weight: Tensor) -> Tensor:
        weights, share = signals.mixture(len(embedding_weight))
        delta = soft_embedding(signals, embedding_weight)
        return restored(delta, embedding_weight, signals.topk_ids.long(), weights, share)

    return [(reduce.Table, "mixture", decoding), (ReferenceSignals, "soft_embedding", training)]


def restored(delta: Tensor, table: Tensor, ids: Tensor, weights: Tensor, share: Tensor) -> Tensor:
    """delta (N, D) = sum_k weights[n, k] E[ids[n, k]] + share[n] sum_v E[v], with the same sum of norms as its norm."""
    norms = table.norm(dim=-1)
    expected = (norms[ids] * weights).sum(-1) + share * norms.sum()
    return delta * (expected / delta.norm(dim=-1).clamp(min=1e-6))[:, None]


# -- soft masks
class SoftMask(nn.Module):
    """In the place of LearnedAlpha, with alpha_scale ln K. The scale starts at 0.5: from the authors' 1e-6 the steps of
    the experiment would not take it anywhere."""

    def __init__(self) -> None:
        super().__init__()
        start = [0.0, math.log(math.expm1(0.75)), 6.67]
        self.numbers = nn.Parameter(torch.tensor(start) / _FASTER)

    def forward(self, uncertainty: Tensor, confidence: Tensor) -> Tensor:
        scale, centre, steep = (_FASTER * self.numbers).unbind()
        entropy = uncertainty * math.log(SOFT_TOP_K)
        return torch.sigmoid(scale) * torch.sigmoid(steep * (F.softplus(centre) - entropy))


def _soft_masked() -> list[tuple[Any, str, Any]]:
    reduce_encoded, encoded = reduce.reduce_encoded, own_signals.encoded

    def decoding(e: Any, mask: int, settings: Any, table: reduce.Table, plain: Callable[[], Any]) -> reduce.Reduced:
        found = reduce_encoded(e, mask, settings, table, plain)
        logprobs, entropy = renormalised(e.logprobs)
        kept = e._replace(logprobs=logprobs, entropy=entropy, tail=torch.zeros_like(e.tail))
        soft = reduce_encoded(kept, mask, settings, table, plain)
        return found._replace(alpha=soft.alpha, delta=soft.delta)

    def training(*arguments: Any, **more: Any) -> ReferenceSignals:
        signals = encoded(*arguments, **more)
        logprobs, entropy = renormalised(signals.topk_logprobs.float())
        tail = torch.zeros_like(signals.tail_mass)
        return replace(signals, topk_logprobs=logprobs.half(), entropy=entropy, tail_mass=tail)

    return [
        (loop, "LearnedAlpha", SoftMask),
        (reduce, "reduce_encoded", decoding),
        (own_signals, "encoded", training),
    ]


def renormalised(logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> the same with probabilities that sum to 1, and their entropies (N,) in nats."""
    logprobs = torch.log_softmax(logprobs, -1)
    return logprobs, -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1)


KINDS: dict[str, Callable[[], list[tuple[Any, str, Any]]]] = {
    "restored_norm": _restored_norm,
    "soft_masked": _soft_masked,
}
