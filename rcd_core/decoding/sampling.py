"""From logits to (token, confidence): greedy or drawn by one keyed uniform number per position.

Inverse-CDF sampling needs one number a position, so a draw depends on (seed, position, pass) and on nothing else:
not on the batch, not on the order of calls.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingColumns:
    """Per position: temperature (N,), 0 = argmax; top_k (N,), V = off; top_p (N,), 1 = off; uniform (N,) draws;
    filtered (N,) bool: confidence after top-k and top-p; no_eos, eos_last (N,) bool: LLaDA's two EOS options."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    uniform: Tensor
    filtered: Tensor
    no_eos: Tensor
    eos_last: Tensor

    def __getitem__(self, index: slice | Tensor) -> SamplingColumns:
        return SamplingColumns(*(getattr(self, f.name)[index] for f in fields(self)))


@dataclass(frozen=True)
class SpecialTokens:
    """mask: never chosen. eos, ends: what logits_eos_inf and confidence_eos_eot_inf are about (ids)."""

    mask: int
    eos: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()


def filtered_probabilities(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """(N, V) -> (N, V) the distribution tokens are drawn from (semantics.md 1.7): temperature, then top-k (keep
    >= the k-th value), then top-p on what is left (a token goes if the mass before it already exceeds p)."""
    scaled = logits / temperature[:, None]
    vocab_size = logits.shape[1]
    if bool((top_k < vocab_size).any()):
        kth = scaled.sort(-1, descending=True).values.gather(1, top_k.clamp(max=vocab_size)[:, None] - 1)
        scaled = scaled.masked_fill(scaled < kth, float("-inf"))
    if bool((top_p < 1.0).any()):
        probs, order = torch.softmax(scaled, dim=-1).sort(-1, descending=True)
        drop = probs.cumsum(-1) - probs > top_p[:, None]
        scaled = scaled.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))
    return torch.softmax(scaled, dim=-1)


def choose_tokens(
    logits: Tensor, columns: SamplingColumns, special: SpecialTokens, tempered_confidence: bool
) -> tuple[Tensor, Tensor]:
    """(N, V) fp32 logits -> (tokens (N,), confidence (N,)). The mask token is never chosen.

    Confidence is the token's probability in the full softmax: before top-k and top-p (unless `filtered`), and at the
    sampling temperature if `tempered_confidence` (SDAR's evaluation code) or at temperature 1 (LLaDA). Where eos_last
    holds it is taken without the ends of sequence and turn, which so get 0 (LLaDA's code at temperature 0; above that
    it spares EOS by an aliasing slip, which is not followed).
    """
    logits = _without(logits, special.eos, columns.no_eos)
    allowed = logits.clone()
    allowed[:, special.mask] = float("-inf")
    tokens = allowed.argmax(-1)
    drawn = (columns.temperature > 0).nonzero().flatten()
    divisor = torch.ones_like(columns.temperature)
    filtered = torch.zeros_like(columns.temperature)
    if len(drawn):
        c = columns[drawn]
        probs = filtered_probabilities(allowed[drawn], c.temperature, c.top_k, c.top_p)
        cdf = probs.double().cumsum(-1)
        target = c.uniform.double() * cdf[:, -1]
        # right=True: the first index whose running sum exceeds u, never a token of probability 0.
        picked = torch.searchsorted(cdf, target[:, None], right=True).flatten()
        tokens[drawn] = picked.clamp(max=logits.shape[1] - 1)
        filtered[drawn] = probs.gather(1, tokens[drawn][:, None]).squeeze(1)
        if tempered_confidence:
            divisor[drawn] = c.temperature
    logp = torch.log_softmax(_without(logits, special.ends, columns.eos_last) / divisor[:, None], dim=-1)
    confidence = logp.gather(1, tokens[:, None]).squeeze(1).exp()
    return tokens, torch.where(columns.filtered, filtered, confidence)


def _without(logits: Tensor, ids: tuple[int, ...], rows: Tensor) -> Tensor:
    """Logits with `ids` at -inf in the rows where `rows` (N,) is True."""
    if not ids or not bool(rows.any()):
        return logits
    dropped = torch.zeros_like(logits, dtype=torch.bool)
    dropped[:, list(ids)] = rows[:, None]
    return logits.masked_fill(dropped, float("-inf"))
