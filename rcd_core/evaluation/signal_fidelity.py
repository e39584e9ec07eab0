"""Loss of information in sparse reference signals: error of the target's input and change of its loss.

    report = measure(reference, target, [(batch, None)], kinds_up_to(reference.vocab_size))

The dense distributions are recomputed from the reference, tile by tile. Error at a masked position, with e the input of
Eq. 2:  ||alpha (delta_sparse - delta_dense)|| / ||e||,   e = (1 - alpha) E[M] + alpha delta_dense.

Shapes: N masked positions, V vocabulary, D width of the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rcd_core.alpha import LearnedAlpha
from rcd_core.alpha import entropy as residual_entropy
from rcd_core.decode_settings import AlphaRule
from rcd_core.dense_signals import DenseSignals
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.signals import ReferenceSignals
from rcd_core.training.objective import LossWeight, TrainingBatch, masked_blocks, masked_hidden, training_loss

Treatment = Literal["drop", "renormalise", "mean_tail"]
NUM_DECILES = 10
_TILE_BYTES = 64 << 20  # fp32 logits in memory at once
_ENTRY_BYTES = 4 + 2  # int32 id, fp16 log-probability


@dataclass(frozen=True)
class Kind:
    """A sparse form: k and mass as in ReferenceSignals.from_logits, and the treatment of the tail's probability mass:
    drop it, renormalise the kept entries, or put it on the mean of the other embeddings (as training does)."""

    k: int
    mass: float | None = None
    treatment: Treatment = "mean_tail"

    def __post_init__(self) -> None:
        if self.treatment not in get_args(Treatment):
            raise UserError(f"treatment is {self.treatment!r}; allowed: {', '.join(get_args(Treatment))}")


@dataclass(frozen=True)
class Fidelity:
    """One kind over all positions. kept: entries per masked token; bytes_per_token: before compression; error: mean
    relative error of the input; error_by_decile: of entropy, lowest first; loss_change: (loss - dense) / dense."""

    kind: Kind | None  # None: the stored signals
    kept: float
    bytes_per_token: float
    error: float
    error_by_decile: tuple[float, ...]
    loss_change: float


@dataclass(frozen=True)
class Report:
    """positions: number of masked positions; entropy_by_decile: means in nats; loss_dense: with dense signals;
    loss_without: without residuals, for scale."""

    positions: int
    entropy_by_decile: tuple[float, ...]
    loss_dense: float
    loss_without: float
    rows: tuple[Fidelity, ...]


def kinds_up_to(vocab_size: int, ks: Sequence[int] = (8, 16, 32, 64, 128), masses: Sequence[float] = ()) -> list[Kind]:
    """Every treatment at every k <= V / 4, then mean_tail at the largest of these with each mass."""
    usable = [k for k in ks if k <= vocab_size // 4] or [max(1, vocab_size // 4)]
    fixed = [Kind(k, None, treatment) for k in usable for treatment in get_args(Treatment)]
    return fixed + [Kind(usable[-1], mass) for mass in masses]


def sparse_delta(signals: ReferenceSignals, embedding_weight: Tensor, treatment: Treatment) -> Tensor:
    """Eq. 1 from the kept entries: (N, D), differentiable in the (V, D) table."""
    if treatment == "mean_tail":
        return signals.soft_embedding(embedding_weight)
    p = signals.topk_logprobs.float().exp()
    if treatment == "renormalise":
        p = p / p.sum(1, keepdim=True)
    return torch.nn.functional.embedding_bag(
        signals.topk_ids.long(), embedding_weight, per_sample_weights=p.to(embedding_weight.dtype), mode="sum"
    )


def input_error(alpha: Tensor, delta: Tensor, dense: Tensor, mask_embedding: Tensor) -> Tensor:
    """(N,), (N, D), (N, D), (D,) -> (N,) relative error of the input of Eq. 2."""
    alpha = alpha[:, None].to(dense.dtype)
    inputs = (1.0 - alpha) * mask_embedding + alpha * dense
    errors: Tensor = torch.linalg.vector_norm(alpha * (delta - dense), dim=1)
    sizes: Tensor = torch.linalg.vector_norm(inputs, dim=1)
    return errors / sizes


def by_decile(values: Tensor, entropy: Tensor) -> tuple[float, ...]:
    """(N,), (N,) -> means of ten equal parts by rising entropy, without empty parts."""
    parts = torch.tensor_split(values[entropy.argsort(stable=True)], NUM_DECILES)
    return tuple(float(part.mean()) for part in parts if len(part))


def bytes_per_token(signals: ReferenceSignals, treatment: Treatment = "mean_tail", ragged: bool = False) -> float:
    """Mean bytes per position before compression: entries, entropy, tail mass if used, k if ragged."""
    entries = _ENTRY_BYTES * float(torch.isfinite(signals.topk_logprobs).sum(1).float().mean())
    return entries + 4 + (4 if treatment == "mean_tail" else 0) + (2 if ragged else 0)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How signals become residuals: the alpha rule with its scale or network, and the temperatures of the signals."""

    alpha: AlphaRule = "normalized_entropy"
    alpha_scale: float | None = None
    learned: LearnedAlpha | None = None
    alpha_temperature: float = 1.0
    delta_temperature: float = 1.0

    @property
    def temperatures(self) -> dict[str, float]:
        return {"alpha_temperature": self.alpha_temperature, "delta_temperature": self.delta_temperature}


class _State(NamedTuple):
    """Residuals of N positions: alpha (N,), delta (N, D), kept entries (N,), total bytes."""

    alpha: Tensor
    delta: Tensor
    kept: Tensor
    size: float


class _Part(NamedTuple):
    """One kind on one batch: relative errors (N,), sums of kept entries and bytes, loss."""

    errors: Tensor
    kept: float
    size: float
    loss: float


@torch.no_grad()
def measure(
    reference: DiffusionModel,
    target: DiffusionModel,
    batches: Iterable[tuple[TrainingBatch, ReferenceSignals | None]],
    kinds: Sequence[Kind],
    rule: Rule = Rule(),  # noqa: B008 (frozen)
    weight: LossWeight = "uniform",
) -> Report:
    """Measure every kind on the same batches, and stored signals, if a batch has them, as kind None.

    Losses are means over batches of training_loss. Memory: (kinds, N, D) of one batch. Raises UserError if no position
    is masked.
    """
    table = target.embedding.weight
    entropies: list[Tensor] = []
    dense_losses, plain_losses = [], []
    parts_of: dict[Kind | None, list[_Part]] = {}
    for batch, stored in batches:
        if not batch.masked.any():
            continue
        blocks = masked_blocks(target, batch)
        entropy, dense, sparse = _residuals(reference, table, batch, kinds, stored, rule, blocks)
        entropies.append(entropy)
        dense_losses.append(float(training_loss(target, batch, (dense.alpha, dense.delta), weight=weight)))
        plain_losses.append(float(training_loss(target, batch, None, weight=weight)))
        for kind, state in sparse.items():
            errors = input_error(dense.alpha, state.delta, dense.delta, table[target.mask_token_id])
            loss = float(training_loss(target, batch, (state.alpha, state.delta), weight=weight))
            parts_of.setdefault(kind, []).append(_Part(errors, float(state.kept.sum()), state.size, loss))
    if not entropies:
        raise UserError("no position of the sample is masked; give a larger sample")
    entropy = torch.cat(entropies)
    loss_dense = fmean(dense_losses)
    rows = []
    for kind, parts in parts_of.items():
        errors = torch.cat([p.errors for p in parts])
        kept, size = (sum(values) / len(entropy) for values in ([p.kept for p in parts], [p.size for p in parts]))
        change = fmean(p.loss for p in parts) / loss_dense - 1.0
        rows.append(Fidelity(kind, kept, size, float(errors.mean()), by_decile(errors, entropy), change))
    return Report(len(entropy), by_decile(entropy, entropy), loss_dense, fmean(plain_losses), tuple(rows))


def _residuals(
    reference: DiffusionModel,
    table: Tensor,
    batch: TrainingBatch,
    kinds: Sequence[Kind],
    stored: ReferenceSignals | None,
    rule: Rule,
    blocks: Tensor,
) -> tuple[Tensor, _State, dict[Kind | None, _State]]:
    """(entropies (N,), dense residuals, residuals of every kind) from one pass of the reference."""
    hidden = masked_hidden(reference, batch, None)
    entropies: list[Tensor] = []
    dense: list[_State] = []
    sparse: dict[Kind | None, list[_State]] = {}
    for tile in torch.split(torch.arange(len(hidden)), max(1, _TILE_BYTES // (4 * reference.vocab_size))):
        logits = reference.head(hidden[tile]).float()
        dense_signals = DenseSignals(logits, **rule.temperatures)
        signals_of: dict[Kind | None, ReferenceSignals] = {
            kind: ReferenceSignals.from_logits(logits, kind.k, kind.mass, **rule.temperatures) for kind in kinds
        }
        if stored is not None:
            signals_of[None] = stored[tile].to(logits.device)
        entropies.append(residual_entropy(logits / rule.alpha_temperature))
        dense.append(_state(dense_signals, dense_signals.soft_embedding(table), len(table), rule, blocks[tile]))
        for kind, signals in signals_of.items():
            treatment: Treatment = kind.treatment if kind else "mean_tail"
            state = _state(signals, sparse_delta(signals, table, treatment), len(table), rule, blocks[tile])
            size = bytes_per_token(signals, treatment, ragged=kind is not None and kind.mass is not None) * len(tile)
            sparse.setdefault(kind, []).append(state._replace(size=size))
    return torch.cat(entropies), _join(dense), {kind: _join(states) for kind, states in sparse.items()}


def _state(
    signals: ReferenceSignals | DenseSignals, delta: Tensor, vocab_size: int, rule: Rule, blocks: Tensor
) -> _State:
    entries = signals.topk_logprobs if isinstance(signals, ReferenceSignals) else signals.logits
    alpha = signals.alpha(vocab_size, rule.alpha, rule.alpha_scale, learned=rule.learned, groups=blocks)
    return _State(alpha, delta, torch.isfinite(entries).sum(1), 0.0)


def _join(states: Sequence[_State]) -> _State:
    alpha, delta, kept = (torch.cat(column) for column in zip(*(state[:3] for state in states), strict=True))
    return _State(alpha, delta, kept, sum(state.size for state in states))
