"""What decoding computes over the vocabulary: for a model on one rank, and for one whose embedding table and head are
split over the ranks of tensor parallelism.

Split, a rank computes the logits of its own ids. Sums and largest entries are exchanged, a few numbers a position, and
parts of delta, D numbers. Whole logits are gathered only where tokens are drawn or an EOS option shapes them.

Shapes: N positions, V vocabulary, v ids of this rank, K kept entries, D width, R ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rcd_core.alpha import alpha_from_statistics
from rcd_core.decode_settings import AlphaRule
from rcd_core.dense_signals import HiddenSignals
from rcd_core.families.base import DiffusionModel
from rcd_core.ops.encode import LOWEST, encode_tile, rest_sums, sums_below
from rcd_core.ops.reduce import Feedback, Reduced, Table, reduce_encoded, reduce_greedy
from rcd_core.ops.top_k import largest, top_k
from rcd_core.signals import ReferenceSignals, Signals, residual_state


def vocabulary_of(model: DiffusionModel) -> Vocabulary:
    return Vocabulary(model) if model.ranks.size == 1 else SplitVocabulary(model)


class Vocabulary:
    """Of a model on one rank."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model, self.table = model, Table(model.embedding.weight, model.learned_alpha)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, v), of this rank's ids."""
        return F.linear(hidden, self.model.lm_head_weight)

    def whole(self, logits: Tensor) -> Tensor:
        """(N, v) -> (N, V)."""
        return logits

    def reduce(self, logits: Tensor, feedback: Feedback | None, with_entropy: bool) -> Reduced:
        """(N, v) logits, fp32 or wider -> Reduced, computed in their dtype. No host synchronisation."""
        return reduce_greedy(logits, self.model.mask_token_id, feedback, self.table, with_entropy)

    def residual(self, signals: Signals, rule: AlphaRule, alpha_scale: float | None) -> tuple[Tensor, Tensor]:
        """(alpha (N,), delta (N, D)) from signals."""
        weight, learned = self.model.embedding.weight, self.model.learned_alpha
        return residual_state(signals, weight, rule, alpha_scale, learned=learned)


class SplitTable(Table):
    """weight (v, D): a rank's rows. Sums are over all ranks' rows."""

    def __init__(self, model: DiffusionModel) -> None:
        super().__init__(model.embedding.weight, model.learned_alpha)
        self.ranks, self.ids = model.ranks, model.ranks.vocabulary(model.vocab_size)
        self._vocab_size = model.vocab_size

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def mean(self, p: Tensor) -> Tensor:
        """(N, v) probabilities of the rank's ids -> (N, D): sum_v p_v E[v]."""
        return self.ranks.sum(p.to(self.weight.dtype) @ self.weight)

    def mixture(self, ids: Tensor, weights: Tensor, share: Tensor) -> Tensor:
        at = ids - self.ids.start
        inside = (at >= 0) & (at < len(self.ids))
        return self.ranks.sum(super().mixture(torch.where(inside, at, 0), weights * inside, share))


class _Best(NamedTuple):
    """Of whole predictions. peak (N,): the largest logit; first (N,): its id. token, confidence (N,): the most probable
    one but the mask. moments: by temperature (Z (N,), entropy (N,)), Z = sum_v e^((z_v - peak) / temperature)."""

    peak: Tensor
    first: Tensor
    token: Tensor
    confidence: Tensor
    moments: dict[float, tuple[Tensor, Tensor]]


class SplitVocabulary(Vocabulary):
    """Of a model on several ranks, which all call the same methods and get the same results."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model, self.ranks = model, model.ranks
        self.table: SplitTable = SplitTable(model)
        self.ids = self.table.ids

    def whole(self, logits: Tensor) -> Tensor:
        return self.ranks.whole(logits, self.table.vocab_size)

    def reduce(self, logits: Tensor, feedback: Feedback | None, with_entropy: bool) -> Reduced:
        if feedback is None:
            return self._plain(logits)
        alpha_t, delta_t = feedback.alpha_temperature, feedback.delta_temperature
        if feedback.kept is not None:
            k = min(feedback.kept, self.table.vocab_size)
            encoded = encode_tile(logits, k, alpha_t, delta_t, self._tail_sums, self._top_k)
            mask = self.model.mask_token_id
            return reduce_encoded(encoded, mask, feedback, self.table, lambda: self._plain(logits))
        best = self._best(logits, (1.0, alpha_t, delta_t))
        (z_sum, entropy), scale = best.moments[alpha_t], feedback.alpha_scale
        learned = self.table.learned
        alpha = alpha_from_statistics(feedback.rule, entropy, 1 / z_sum, self.table.vocab_size, scale, learned=learned)
        if feedback.rule == "top1":
            delta = self.model.embedding(best.first)
        else:
            x = (logits - best.peak[:, None]) / delta_t
            delta = self.table.mean(x.exp_() / best.moments[delta_t][0][:, None])
        return Reduced(best.token, best.confidence, best.moments[1.0][1], alpha, delta)

    def residual(self, signals: Signals, rule: AlphaRule, alpha_scale: float | None) -> tuple[Tensor, Tensor]:
        if isinstance(signals, HiddenSignals):
            parts = [self.residual(tile, rule, alpha_scale) for tile in signals.tiles()]
            return torch.cat([alpha for alpha, _ in parts]), torch.cat([delta for _, delta in parts])
        alpha = signals.alpha(self.table.vocab_size, rule, alpha_scale, learned=self.table.learned)
        if rule == "top1":
            return alpha, self.model.embedding(signals.top1())
        if isinstance(signals, ReferenceSignals):
            return alpha, self.table.mixture(signals.topk_ids.long(), *signals.mixture(self.table.vocab_size))
        p = torch.softmax(signals.logits / signals.delta_temperature, -1)
        return alpha, self.table.mean(p[:, self.ids.start : self.ids.stop])

    def _plain(self, z: Tensor) -> Reduced:
        best = self._best(z, (1.0,))
        return Reduced(best.token, best.confidence, best.moments[1.0][1])

    def _best(self, z: Tensor, temperatures: tuple[float, ...]) -> _Best:
        """temperatures: of the moments, 1 among them."""
        peak, first = largest(z)
        columns = [peak, first + self.ids.start]
        allowed, mask = z, self.model.mask_token_id
        if mask in self.ids:
            allowed = z.clone()
            allowed.select(1, mask - self.ids.start).fill_(float("-inf"))
        value, token = largest(allowed)
        columns += [value, token + self.ids.start]
        temperatures = tuple(dict.fromkeys(temperatures))
        for temperature in temperatures:
            x = ((z - peak[:, None]) / temperature).clamp_(min=LOWEST)
            e = x.exp()
            columns += [e.sum(-1), torch.linalg.vecdot(e, x)]
        parts = self.ranks.gather(torch.stack([c.to(z.dtype) for c in columns])).unbind(1)  # of (R, N)
        (peak, first), (value, token) = (_largest(*parts[i : i + 2]) for i in (0, 2))
        moments = {}
        for i, temperature in enumerate(temperatures):
            mass, dot = parts[4 + 2 * i : 6 + 2 * i]
            x = ((parts[0] - peak) / temperature).clamp_(min=LOWEST)
            z_sum = (mass * x.exp()).sum(0)
            moments[temperature] = z_sum, z_sum.log() - ((dot + mass * x) * x.exp()).sum(0) / z_sum
        return _Best(peak, first.long(), token.long(), (value - peak).exp() / moments[1.0][0], moments)

    def _top_k(self, z: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(N, v) logits -> values and ids (N, K) of the k largest of the whole vocabulary."""
        count = min(k, -(-self.table.vocab_size // self.ranks.size))
        own = min(count, z.shape[1])
        values, ids = top_k(z, own)
        padding = (0, count - own)  # the last rank may have fewer ids
        found = torch.stack([F.pad(values, padding, value=float("-inf")), F.pad(ids + self.ids.start, padding).to(z)])
        values, ids = self.ranks.gather(found).permute(1, 2, 0, 3).flatten(2)  # of (N, R count)
        top, at = values.topk(k)
        return top, ids.gather(1, at).long()

    def _tail_sums(self, z: Tensor, top: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return rest_sums(self.ranks.sum(sums_below(z, top, temperature)), top, temperature)


def _largest(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(R, N) values and their ids -> (N,) the largest value of each column and its id."""
    best, rank = values.max(0)
    return best, ids.gather(0, rank[None])[0]
