"""What is wrapped for training on several workers: one micro-batch's loss, wherever its residuals come from.

The model's own previous passes (sources self, self_same, on_policy) run in here too, because parameters that lie in
shards are only whole inside the wrapped module.

Shapes: B rows, L tokens, N masked positions, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rcd_core.decode_settings import AlphaRule
from rcd_core.families.base import DiffusionModel
from rcd_core.residual import ResidualSettings
from rcd_core.signals import ReferenceSignals, residual_state, sparse_residual
from rcd_core.training.data.batches import MicroBatch
from rcd_core.training.objective import (
    LossWeight,
    Residual,
    TrainingBatch,
    loss_parts,
    masked_blocks,
    masked_hidden,
)

OWN_TOP_K = 32  # entries kept of the model's own predictions
NUM_BUCKETS = 4  # of the masking probability, for looking at the loss
NUM_STATISTICS = 2 + 2 * NUM_BUCKETS


class LossModule(nn.Module):
    """The sum of weighted losses of one micro-batch, residual included, not yet normalised."""

    def __init__(self, model: DiffusionModel, weight: LossWeight, residual: ResidualSettings) -> None:
        super().__init__()
        self.model, self.weight, self.residual = model, weight, residual

    def forward(self, micro: MicroBatch, signals: ReferenceSignals | None) -> tuple[Tensor, Tensor]:
        """(loss sum, statistics (NUM_STATISTICS,)): sum of alpha, tokens that entered the layers, then losses and
        counts by masking probability. signals: the reference's, cached or computed outside."""
        batch = micro.batch
        state: Residual | None = None
        if signals is not None:
            rule, more = self._rule(batch)
            kept = signals if self.residual.top_k is None else signals.largest(self.residual.top_k)
            state = sparse_residual(kept, self.model.vocab_size, *rule, **more).scaled(micro.keep)
        elif self.residual.source == "on_policy":
            batch = self._on_policy(micro)
        elif self.residual.runs_model:
            alpha, delta = self._own_residual(micro)
            state = (alpha * micro.keep, delta)
        loss, losses = loss_parts(self.model, batch, state, self.weight)
        return loss, _statistics(batch, losses, state)

    def _previous(self, micro: MicroBatch, masked: Tensor, state: tuple[Tensor, Tensor] | None) -> Tensor:
        """(N', D) hidden states of a previous pass over the noisier input `masked` (B, L)."""
        batch = _with_mask(micro.batch, masked, self.model.mask_token_id)
        return masked_hidden(self.model, batch, state)

    def _rule(self, batch: TrainingBatch) -> tuple[tuple[AlphaRule, float | None], dict[str, Any]]:
        """What alpha follows from, besides the signals at the batch's masked positions."""
        groups = masked_blocks(self.model, batch) if self.residual.alpha == "uniform" else None
        rule = (self.residual.alpha, self.residual.alpha_scale)
        return rule, {"learned": self.model.learned_alpha, "groups": groups}

    def _own_residual(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """(alpha (N,), delta (N, D)) of the model's own last pass, each pass fed by the one before, as in decoding.
        Without gradient, but for the last alpha where it is learned."""
        assert micro.chain is not None and micro.depth is not None
        state = None
        masks = [*micro.chain, micro.batch.masked]
        for number, (masked, following) in enumerate(zip(masks, masks[1:], strict=False)):
            with torch.no_grad():
                hidden = self._previous(micro, masked, state)
                signals = ReferenceSignals.from_hidden(
                    hidden, self.model.lm_head_weight, self.residual.top_k or OWN_TOP_K
                )[following[masked]]
            last = number + 2 == len(masks)
            with torch.set_grad_enabled(last and torch.is_grad_enabled()):
                rule, more = self._rule(_with_mask(micro.batch, following, self.model.mask_token_id))
                alpha, delta = residual_state(signals, self.model.embedding.weight.detach(), *rule, **more)
            # Rows with fewer previous passes start later.
            begun = micro.depth[following] >= len(micro.chain) - number
            state = (alpha * begun, delta)
        assert state is not None
        return state

    @torch.no_grad()
    def _on_policy(self, micro: MicroBatch) -> TrainingBatch:
        """The control without residuals: as many masks as before, but those the model would leave: of a noisier input
        the tokens it is most confident about are given."""
        assert micro.chain is not None
        masked = micro.chain[-1]
        hidden = self._previous(micro, masked, None)
        tile = max(1, (64 << 20) // (4 * self.model.vocab_size))
        tops = [torch.log_softmax(self.model.head(h).float(), -1).amax(-1) for h in torch.split(hidden, tile)]
        confidence = torch.full(masked.shape, float("-inf"), device=masked.device)
        confidence[masked] = torch.cat(tops) if tops else confidence[masked]
        left = torch.zeros_like(masked)
        assert micro.batch.sample_ids is not None
        for row in range(masked.shape[0]):
            samples = micro.batch.sample_ids[row]
            for sample in range(int(samples.max()) + 1):
                mine = samples == sample
                count = int((micro.batch.masked[row] & mine).sum())
                scores = torch.where(masked[row] & mine, -confidence[row], float("-inf"))
                left[row, scores.topk(count).indices] = True  # the least confident stay masked
        return _with_mask(micro.batch, left, self.model.mask_token_id)


def _with_mask(batch: TrainingBatch, masked: Tensor, mask_token_id: int) -> TrainingBatch:
    noisy = torch.where(masked, mask_token_id, batch.input_ids)
    return replace(batch, masked=masked, noisy_ids=noisy, packed=None)


def _statistics(batch: TrainingBatch, losses: Tensor, state: Residual | None) -> Tensor:
    assert batch.sample_ids is not None
    entered = (batch.sample_ids >= 0).sum() if batch.packed is None else batch.packed.valid.sum()
    alpha = losses.new_zeros(())
    if state is not None:
        alpha = (state[0] if isinstance(state, tuple) else state.alpha).detach().sum()
    bucket = (batch.p_mask[batch.masked] * NUM_BUCKETS).long().clamp(max=NUM_BUCKETS - 1)
    sums = losses.new_zeros(NUM_BUCKETS).scatter_add_(0, bucket, losses)
    counts = losses.new_zeros(NUM_BUCKETS).scatter_add_(0, bucket, torch.ones_like(losses))
    return torch.cat([alpha[None], entered[None].to(losses.dtype), sums, counts]).double()
