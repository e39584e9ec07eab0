"""The module that a strategy (DDP, FSDP2, DeepSpeed) wraps: one micro-batch's loss, whatever its residual source.

Self-residual passes run inside the module because sharded parameters are whole only there.

Shapes: B rows, L tokens, N masked positions, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rcd_core.families.base import DiffusionModel
from rcd_core.signals import ReferenceSignals, sparse_residual
from rcd_core.training.controls import on_policy_batch
from rcd_core.training.data.batches import MicroBatch
from rcd_core.training.loopholing import first_states
from rcd_core.training.lora import adapters_off
from rcd_core.training.objective import (
    LossWeight,
    Residual,
    Teacher,
    TrainingBatch,
    loss_parts,
    reference_signals,
    teacher_of,
)
from rcd_core.training.own_signals import alpha_rule, own_residual, own_signals
from rcd_core.training.settings import ResidualSettings, SignalRule

SELF_TOP_K = 32  # entries kept of the model's own predictions where residual.top_k is null
NUM_BUCKETS = 4  # of the masking probability, for the logged losses
NUM_STATISTICS = 2 + 2 * NUM_BUCKETS


class LossModule(nn.Module):
    """The sum of weighted losses of one micro-batch, with its residual inputs, not normalised."""

    def __init__(
        self,
        model: DiffusionModel,
        weight: LossWeight,
        settings: ResidualSettings,
        own_reference: SignalRule | None = None,
        own_teacher: bool = False,
    ) -> None:
        """own_reference: the reference is the model itself without its adapters, by this rule. own_teacher: so is the
        teacher."""
        super().__init__()
        self.model, self.weight, self.settings = model, weight, settings
        self.own_reference, self.own_teacher = own_reference, own_teacher

    def forward(
        self, micro: MicroBatch, signals: ReferenceSignals | None, teacher: Teacher | None = None
    ) -> tuple[Tensor, Tensor]:
        """signals (N): the reference's, cached or online; None for sources without a reference. teacher (N): another
        model's.

        Returns the loss sum and statistics (NUM_STATISTICS,): the sum of alpha, the tokens that entered the layers,
        then sums and counts of the cross entropy by masking probability.
        """
        batch = micro.batch
        residual: Residual | None = None
        states: Tensor | None = None
        if self.own_reference is not None and micro.noisier_masks is None:
            with adapters_off(self.model):
                signals = reference_signals(self.model, batch, self.own_reference)
        if self.own_teacher:
            with adapters_off(self.model):
                teacher = teacher_of(self.model, batch, own_head=True)
        if signals is not None:
            kept = signals if self.settings.top_k is None else signals.largest(self.settings.top_k)
            rule, more = alpha_rule(self.model, batch, self.settings)
            residual = sparse_residual(kept, self.model.vocab_size, *rule, **more).scaled(micro.keep)
        elif self.settings.source == "on_policy":
            assert micro.noisier_masks is not None
            batch = on_policy_batch(self.model, batch, micro.noisier_masks[-1])
        elif self.settings.source == "loopholing":
            states = first_states(self.model, batch, micro.keep)
        elif micro.noisier_masks is not None:
            own = own_signals(self.model, micro, self.settings, SignalRule(top_k=self.settings.top_k or SELF_TOP_K))
            alpha, delta = own_residual(self.model, own, batch, self.settings)
            residual = (alpha * micro.keep, delta)
        loss, losses = loss_parts(self.model, batch, residual, self.weight, teacher, states)
        return loss, _statistics(batch, losses, residual)


def _statistics(batch: TrainingBatch, losses: Tensor, residual: Residual | None) -> Tensor:
    entered = (batch.sample_ids >= 0).sum() if batch.packed is None else batch.packed.valid.sum()
    alpha = losses.new_zeros(())
    if residual is not None:
        alpha = (residual[0] if isinstance(residual, tuple) else residual.alpha).detach().sum()
    bucket = (batch.p_mask[batch.masked] * NUM_BUCKETS).long().clamp(max=NUM_BUCKETS - 1)
    sums = losses.new_zeros(NUM_BUCKETS).scatter_add_(0, bucket, losses)
    counts = losses.new_zeros(NUM_BUCKETS).scatter_add_(0, bucket, torch.ones_like(losses))
    return torch.cat([alpha[None], entered[None].to(losses.dtype), sums, counts]).double()
