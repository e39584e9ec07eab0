"""Signals that the model in training, or a frozen copy of it, makes itself: its predictions from noisier versions of
the rows, each of which gets the residual of the one before, as in decoding (Algorithm 2).

Shapes: B rows, L tokens, N masked positions, N' masked positions of an earlier pass, P earlier passes, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rcd_core.decode_settings import AlphaRule
from rcd_core.dense_signals import AlphaInputs
from rcd_core.families.base import DiffusionModel
from rcd_core.noise import NoiseSettings, hash_key, uniforms
from rcd_core.signals import ReferenceSignals, residual_state
from rcd_core.training.data.batches import Collator, MicroBatch
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.objective import TrainingBatch, encoded, least_confident, masked_blocks, masked_hidden
from rcd_core.training.settings import ResidualSettings, SignalRule, TrainSettings


class OwnSignals:
    """(N) signals of the frozen model for whole rows, each of which has tokens. settings: of the passes' residuals;
    without any for source "none". on_policy: share of the rows that are masked anew, where decoding would leave masks.
    Which ones, and the noisier versions, depend on seed and on the rows' numbers."""

    def __init__(
        self,
        model: DiffusionModel,
        settings: ResidualSettings,
        rule: SignalRule,
        noise: NoiseSettings,
        block_length: int,
        seed: int,
        on_policy: float = 0.0,
    ) -> None:
        self.model, self.rule, self.on_policy, self.seed = model, rule, on_policy, seed
        self.settings = replace(settings, dropout=0.0, self_share=0.0)
        self.collator = Collator(
            settings=TrainSettings(steps=1, batch_size=1, seed=seed),
            residual=replace(self.settings, source="self"),
            mask_token_id=model.mask_token_id,
            pad_token_id=model.info.pad_token_id,
            block_length=block_length,
            block_diffusion=model.attention_block(block_length) is not None,
            noise=noise,
        )

    def __call__(self, rows: Sequence[TrainingRow]) -> tuple[list[TrainingRow], ReferenceSignals]:
        """(the rows as they are trained, their signals)."""
        (micro,) = self.collator.micro_batches(list(rows))
        micro = micro.to(self.model.device)
        if not self.on_policy:
            return list(rows), own_signals(self.model, micro, self.settings, self.rule)
        chosen = [uniforms(hash_key(self.seed, "on policy", row.index), 1)[0] < self.on_policy for row in rows]
        anew = torch.tensor(chosen, device=self.model.device)
        masked, signals = on_policy_signals(self.model, micro, self.settings, self.rule, anew)
        new = masked.cpu().numpy()
        return [replace(row, masked=new[i, : len(row.masked)]) for i, row in enumerate(rows)], signals


def own_signals(
    model: DiffusionModel, micro: MicroBatch, settings: ResidualSettings, rule: SignalRule
) -> ReferenceSignals:
    """(N) signals of the last of the P earlier passes at the micro-batch's masked positions. settings: alpha of the
    passes' residuals. rule: what is kept of the predictions."""
    noisier, signals = _last_pass(model, micro, settings, rule)
    return signals[micro.batch.masked[noisier]]


def on_policy_signals(
    model: DiffusionModel, micro: MicroBatch, settings: ResidualSettings, rule: SignalRule, anew: Tensor
) -> tuple[Tensor, ReferenceSignals]:
    """(masks (B, L), signals (N)), in the rows `anew` (B,) as decoding would leave them after the last earlier pass: of
    each block the tokens that this pass is least sure of stay masked, as many as the row's own masks, and keep its
    predictions. The other rows keep their masks."""
    noisier, signals = _last_pass(model, micro, settings, rule)
    kept = least_confident(model, micro.batch, noisier, signals.topk_logprobs[:, 0])
    kept = torch.where(anew[:, None].expand_as(noisier)[noisier], kept, micro.batch.masked[noisier])
    masked = torch.zeros_like(noisier)
    masked[noisier] = kept
    return masked, signals[kept]


@torch.no_grad()
def _last_pass(
    model: DiffusionModel, micro: MicroBatch, settings: ResidualSettings, rule: SignalRule
) -> tuple[Tensor, ReferenceSignals]:
    """(its masks (B, L), the signals (N') at them). A row with fewer passes has no residual until its first one."""
    assert micro.noisier_masks is not None and micro.num_passes is not None
    temperatures = {"alpha_temperature": rule.alpha_temperature, "delta_temperature": rule.delta_temperature}
    residual: tuple[Tensor, Tensor] | None = None
    masks = list(micro.noisier_masks if settings.feeds_back else micro.noisier_masks[-1:])
    for number, masked in enumerate(masks):
        batch = micro.batch.remasked(masked, model.mask_token_id)
        hidden = masked_hidden(model, batch, residual)  # (N', D)
        signals = encoded(model, hidden, rule.top_k, rule.keep_mass, **temperatures)
        if number + 1 == len(masks):
            break
        following = masks[number + 1]
        after = micro.batch.remasked(following, model.mask_token_id)
        alpha, delta = own_residual(model, signals[following[masked]], after, settings)
        residual = (alpha * (micro.num_passes[following] >= len(masks) - number), delta)
    return masks[-1], signals


def own_residual(
    model: DiffusionModel, signals: ReferenceSignals, batch: TrainingBatch, settings: ResidualSettings
) -> tuple[Tensor, Tensor]:
    """(alpha (N,), delta (N, D)) of a model's own signals at the batch's masked positions. No gradient reaches the
    embedding; a learned alpha gets one."""
    rule, more = alpha_rule(model, batch, settings)
    result: tuple[Tensor, Tensor] = model.embedding(
        signals.topk_ids, lambda table, _: residual_state(signals, table.detach(), *rule, **more)
    )
    return result


def alpha_rule(
    model: DiffusionModel, batch: TrainingBatch, settings: ResidualSettings
) -> tuple[tuple[AlphaRule, float | None], AlphaInputs]:
    groups = masked_blocks(model, batch) if settings.alpha == "uniform" else None
    return (settings.alpha, settings.alpha_scale), {"learned": model.learned_alpha, "groups": groups}
