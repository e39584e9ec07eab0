"""The masked-diffusion objective, plain or with residual inputs, for base, reference, target and baseline.

Loss = sum over masked positions of w_i * -log P(x_i | inputs), divided by a normaliser (Eq. 4).
The head runs on the masked positions only.

Shapes: B rows, L tokens, N masked positions in row-major order, M tokens that enter the layers, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rcd_core.attention import PackedTokens, bidirectional, block_diffusion, causal_blocks
from rcd_core.decode_settings import AlphaRule
from rcd_core.dense_signals import DenseSignals
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.ops.fused_loss import weighted_cross_entropy
from rcd_core.ops.residual_embedding import SparseResidual, residual_embedding
from rcd_core.residual import inject_residual
from rcd_core.signals import ReferenceSignals, residual_state, sparse_residual
from rcd_core.training.settings import SignalRule

IGNORED = -100

Residual = tuple[Tensor, Tensor] | SparseResidual  # (alpha (N,), delta (N, D)), or weights on the table's rows
LossWeight = Literal["inverse_t", "inverse_t_mean", "uniform", "self_normalized"]


@dataclass
class TrainingBatch:
    """Rows of one or more samples each.

    input_ids (B, L) clean; noisy_ids (B, L) with mask tokens where masked (B, L) bool is set.
    labels (B, L): -100 where not trained. None: every token from prompt_lengths (B,) on is trained.
    p_mask (B, L) or (B,): the probability with which each token was masked.
    sample_ids (B, L): number of the sample in its row, -1 is padding. positions (B, L): from the sample's start. Both
    default to one sample per row without padding.
    first_noisy, num_clean (B, L): what noisy tokens see where several noisy blocks stand behind clean ones
    (`attention.block_diffusion`); None: their own block behind all clean ones before it.
    blocks (B, L): for models that see the whole canvas, the number of a token's block in its sample, which sees no
    later one (`attention.causal_blocks`); None: all of the sample.
    packed: SDAR's [noisy | clean] tokens (`with_packed`), if computed before the step.
    UserError: neither labels nor prompt_lengths, or block_length below 1.
    """

    input_ids: Tensor
    labels: Tensor
    noisy_ids: Tensor
    masked: Tensor
    p_mask: Tensor
    block_length: int
    sample_ids: Tensor = None  # type: ignore[assignment]  # __post_init__ fills it, and positions and labels
    positions: Tensor = None  # type: ignore[assignment]
    prompt_lengths: Tensor | None = None
    first_noisy: Tensor | None = None
    num_clean: Tensor | None = None
    blocks: Tensor | None = None
    packed: PackedTokens | None = None

    def __post_init__(self) -> None:
        num_rows, length = self.input_ids.shape
        if self.p_mask.dim() == 1:
            self.p_mask = self.p_mask[:, None].expand(num_rows, length)
        if self.positions is None:
            self.positions = torch.arange(length, device=self.input_ids.device).expand(num_rows, length)
        if self.sample_ids is None:
            self.sample_ids = torch.zeros_like(self.input_ids)
        if self.labels is None:
            if self.prompt_lengths is None:
                raise UserError("the training batch has neither labels nor prompt_lengths; give one of them")
            trained = (self.positions >= self.prompt_lengths[:, None]) & (self.sample_ids >= 0)
            self.labels = torch.where(trained, self.input_ids, IGNORED)
        if self.block_length < 1:
            raise UserError(f"block_length is {self.block_length}; it must be at least 1")

    def to(self, device: torch.device | str) -> TrainingBatch:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor | PackedTokens)}
        return replace(self, **moved)

    def with_packed(self) -> TrainingBatch:
        seen = (self.first_noisy, self.num_clean)
        packed = block_diffusion(self.masked, self.sample_ids, self.positions, self.block_length, *seen)
        return replace(self, packed=packed)

    def remasked(self, masked: Tensor, mask_token_id: int) -> TrainingBatch:
        """The same tokens under another mask (B, L)."""
        noisy = torch.where(masked, mask_token_id, self.input_ids)
        return replace(self, masked=masked, noisy_ids=noisy, packed=None)


@dataclass(frozen=True)
class LayerTokens:
    """What enters the layers. ids, positions (B, M); masked (B, M): those that are predicted; source (B, M): of each
    token in the batch's rows; takes (B, M): noisy tokens, which Loopholing gives a state, clean ones get none."""

    ids: Tensor
    masked: Tensor
    positions: Tensor
    layout: Any
    source: Tensor | None = None
    takes: Tensor | None = None
    packed: PackedTokens | None = None


def layer_tokens(model: DiffusionModel, batch: TrainingBatch) -> LayerTokens:
    """Raises UserError for a noise layout that the family does not have."""
    whole = model.attention_block(batch.block_length) is None
    if (batch.first_noisy if whole else batch.blocks) is not None:
        given, other = ("multi_block", "d2f") if whole else ("d2f", "multi_block")
        raise UserError(f"noise.layout is {given}, which {model.family} models do not have; set it to {other}")
    if whole:
        layout = bidirectional(batch.sample_ids)
        if batch.blocks is not None:
            layout = causal_blocks(batch.sample_ids, batch.blocks)
        return LayerTokens(batch.noisy_ids, batch.masked, batch.positions, layout)
    packed = batch.packed or batch.with_packed().packed
    assert packed is not None
    source, takes = packed.source, packed.noisy & packed.valid
    ids = torch.where(packed.noisy, batch.noisy_ids.gather(1, source), batch.input_ids.gather(1, source))
    masked = batch.masked.gather(1, source) & takes
    return LayerTokens(ids, masked, batch.positions.gather(1, source), packed.layout, source, takes, packed)


def masked_hidden(
    model: DiffusionModel, batch: TrainingBatch, residual: Residual | None, states: Tensor | None = None
) -> Tensor:
    """(N, D) final hidden states at the masked positions; with a residual their inputs are those of Eq. 2. states
    (B, M, D): of the pass before, of a model with Loopholing (loopholing.py)."""
    tokens = layer_tokens(model, batch)
    ids, masked, positions, packed = tokens.ids, tokens.masked, tokens.positions, tokens.packed
    if isinstance(residual, SparseResidual):
        mixed = residual
        embeds = model.embedding(ids, lambda table, ids: residual_embedding(ids, masked, table, mixed))
    else:
        embeds = model.embedding(ids)
    if isinstance(residual, tuple):
        alpha, delta = residual
        # The mask's embedding as looked up: a row picked from the table would cost a gradient of the table's size.
        embeds = inject_residual(embeds, masked, alpha, delta, embeds[masked])
    at = masked.flatten().nonzero()[:, 0]
    if model.mask_shift is not None:
        embeds = _shifted(embeds, at, model.mask_shift, residual)
    if model.loophole is not None:
        embeds = model.loophole(embeds, states)
    rows = model.predictors(at, positions.flatten()[at] == 0)
    if packed is not None and model.shifted:
        num_tokens = ids.shape[1]
        rows = packed.before.flatten()[at] + at // num_tokens * num_tokens
    return model.hidden(embeds, positions, tokens.layout, at=rows)


def _shifted(embeds: Tensor, at: Tensor, shift: Tensor, residual: Residual | None) -> Tensor:
    """Inputs (B, M, D) with the mask token's embedding moved by shift (D,) at rows `at` (N,) of (B M). In Eq. 2 it has
    the share 1 - alpha."""
    share = torch.ones(len(at), device=embeds.device)
    if residual is not None:
        share = share - (residual.alpha if isinstance(residual, SparseResidual) else residual[0])
    moved = (share[:, None] * shift).to(embeds.dtype)
    return embeds.flatten(0, 1).index_add(0, at, moved).view_as(embeds)


@torch.no_grad()
def reference_signals(reference: DiffusionModel, batch: TrainingBatch, rule: SignalRule) -> ReferenceSignals:
    """(N) signals of the frozen reference at the masked positions, both for the cache and online."""
    hidden = masked_hidden(reference, batch, None)
    temperatures = {"alpha_temperature": rule.alpha_temperature, "delta_temperature": rule.delta_temperature}
    return encoded(reference, hidden, rule.top_k, rule.keep_mass, **temperatures)


def encoded(
    model: DiffusionModel, hidden: Tensor, k: int, mass: float | None = None, **temperatures: float
) -> ReferenceSignals:
    """(N) signals of the model's predictions at final hidden states (N, D), without gradient."""
    signals: ReferenceSignals = model.lm_head(
        hidden, lambda head, rows: ReferenceSignals.from_hidden(rows, head, k, mass, **temperatures)
    )
    return signals


def masked_blocks(model: DiffusionModel, batch: TrainingBatch) -> Tensor:
    """(N,) group numbers: equal for masked positions of the same block (of the same sample where the model's attention
    has no blocks)."""
    if batch.blocks is not None:
        stride = int(batch.blocks.max()) + 1
        rows = torch.arange(len(batch.masked), device=batch.masked.device)[:, None] * (int(batch.sample_ids.max()) + 2)
        return ((rows + batch.sample_ids + 1) * stride + batch.blocks)[batch.masked]
    within = batch.positions[batch.masked]
    if model.attention_block(batch.block_length) is not None:
        within = within % batch.block_length
    return batch.masked.flatten().nonzero()[:, 0] - within  # index of the block's first token in the batch


def least_confident(model: DiffusionModel, batch: TrainingBatch, noisier: Tensor, confidence: Tensor) -> Tensor:
    """(N',) bool: of the positions masked in `noisier` (B, L), with confidences (N',), the lowest of each block, as
    many as the batch's own masks."""
    group = masked_blocks(model, batch.remasked(noisier, model.mask_token_id))
    ordered, by_group = group.sort()
    new = (ordered != ordered.roll(1)).long()
    new[:1] = 0
    of_group = torch.empty_like(by_group).scatter_(0, by_group, new.cumsum(0))  # groups numbered from 0
    order = confidence.argsort(stable=True)
    order = order[of_group[order].argsort(stable=True)]  # by block, the least confident first
    none = torch.zeros_like(of_group)
    sizes = none.index_add(0, of_group, torch.ones_like(of_group))
    counts = none.index_add(0, of_group, batch.masked[noisier].long())
    rank = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[of_group[order]]
    kept = torch.zeros_like(confidence, dtype=torch.bool)
    kept[order] = rank < counts[of_group[order]]
    return kept


def normalizer(batch: TrainingBatch, family: str, weight: LossWeight) -> Tensor:
    """Scalar divisor of the loss sum; the divisors of a step's batches add up.

    uniform, inverse_t_mean (D2F): masked tokens. self_normalized: the sum of the weights 1/t (MultiTF). inverse_t:
    labelled tokens (SDAR) or samples (LLaDA, which first divides each sample by its own labelled tokens).
    """
    if weight in ("uniform", "inverse_t_mean"):
        return batch.masked.sum()
    if weight == "self_normalized":
        return (1.0 / batch.p_mask[batch.masked]).sum()
    if family == "llada":
        return (batch.sample_ids.amax(1) + 1).sum()
    return (batch.labels != IGNORED).sum()


def loss_sum(
    model: DiffusionModel, batch: TrainingBatch, residual: Residual | None = None, weight: LossWeight = "inverse_t"
) -> Tensor:
    """Scalar: the weighted sum over the masked positions, not normalised."""
    return loss_parts(model, batch, residual, weight)[0]


def loss_parts(
    model: DiffusionModel,
    batch: TrainingBatch,
    residual: Residual | None,
    weight: LossWeight,
    teacher: Teacher | None = None,
    states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(`loss_sum`, cross entropies (N,) in nats, unweighted and without gradient). teacher: its predictions instead of
    the labels. states: as of `masked_hidden`."""
    hidden = masked_hidden(model, batch, residual, states)
    weights = loss_weights(model.family, batch, weight)
    labels = batch.input_ids[batch.masked]

    def reduce(head: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        targets = None if teacher is None else (teacher.hidden, head if teacher.head is None else teacher.head)
        return weighted_cross_entropy(rows, head, labels, weights, teacher=targets)

    loss, losses = model.lm_head(hidden, reduce)
    return loss, losses


@dataclass(frozen=True)
class Teacher:
    """hidden (N, D') at the masked positions; head (V, D'), None: that of the model in training."""

    hidden: Tensor
    head: Tensor | None = None


@torch.no_grad()
def teacher_of(model: DiffusionModel, batch: TrainingBatch, own_head: bool = False) -> Teacher:
    """The frozen model's predictions from the same noisy tokens, with its own attention: of LLaDA the whole canvas."""
    plain = replace(batch, first_noisy=None, num_clean=None, blocks=None, packed=None)
    return Teacher(masked_hidden(model, plain, None), None if own_head else model.lm_head_weight)


def loss_weights(family: str, batch: TrainingBatch, weight: LossWeight) -> Tensor:
    """(N,) w_i of each masked position's cross entropy."""
    weights = 1.0 / batch.p_mask[batch.masked]
    if weight == "uniform":
        return torch.ones_like(weights)
    if family == "llada" and weight == "inverse_t":
        samples = batch.sample_ids + 1
        labelled = torch.zeros(len(samples), int(samples.max()) + 1, device=samples.device)
        labelled.scatter_add_(1, samples, (batch.labels != IGNORED).float())
        weights = weights / labelled.gather(1, samples)[batch.masked]
    return weights


def training_loss(
    model: DiffusionModel,
    batch: TrainingBatch | Mapping[str, Any],
    residual: Residual | ReferenceSignals | DenseSignals | None = None,
    *,
    weight: LossWeight = "inverse_t",
    alpha: AlphaRule = "normalized_entropy",
    alpha_scale: float | None = None,
) -> Tensor:
    """Scalar: one batch's loss, normalised as the family's authors do.

    batch: a TrainingBatch or a mapping with its fields. residual: None for plain masked SFT; (alpha (N,),
    delta (N, D)); or the reference's signals (N), from which the rule `alpha` and the model's embedding table make
    them. UserError: masked covers a token whose label is -100.
    """
    if not isinstance(batch, TrainingBatch):
        batch = TrainingBatch(**{"labels": None, **batch})
    if bool((batch.masked & (batch.labels == IGNORED)).any()):
        raise UserError("masked covers tokens whose label is -100; only labelled tokens may be masked")
    learned, groups = model.learned_alpha, masked_blocks(model, batch)
    if isinstance(residual, ReferenceSignals):
        residual = sparse_residual(residual, model.vocab_size, alpha, alpha_scale, learned=learned, groups=groups)
    elif isinstance(residual, DenseSignals):
        residual = residual_state(residual, model.embedding.weight, alpha, alpha_scale, learned=learned, groups=groups)
    return loss_sum(model, batch, residual, weight) / normalizer(batch, model.family, weight)
