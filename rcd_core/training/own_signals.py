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
from rcd_core.noise import NoiseSettings
from rcd_core.signals import ReferenceSignals, residual_state
from rcd_core.training.data.batches import Collator, MicroBatch
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.objective import TrainingBatch, encoded, masked_blocks, masked_hidden
from rcd_core.training.settings import ResidualSettings, SignalRule, TrainSettings


class OwnSignals:
    """(N) signals of the frozen model for whole rows, each of which has tokens. settings: of the passes' residuals. The
    noisier versions depend on seed and on the rows' numbers."""

    def __init__(
        self,
        model: DiffusionModel,
        settings: ResidualSettings,
        rule: SignalRule,
        noise: NoiseSettings,
        block_length: int,
        seed: int,
    ) -> None:
        self.model, self.rule = model, rule
        self.settings = replace(settings, source="self", dropout=0.0)
        self.collator = Collator(
            settings=TrainSettings(steps=1, batch_size=1, seed=seed),
            residual=self.settings,
            mask_token_id=model.mask_token_id,
            pad_token_id=model.info.pad_token_id,
            block_length=block_length,
            block_diffusion=model.attention_block(block_length) is not None,
            noise=noise,
        )

    def __call__(self, rows: Sequence[TrainingRow]) -> ReferenceSignals:
        (micro,) = self.collator.micro_batches(list(rows))
        return own_signals(self.model, micro.to(self.model.device), self.settings, self.rule)


@torch.no_grad()
def own_signals(
    model: DiffusionModel, micro: MicroBatch, settings: ResidualSettings, rule: SignalRule
) -> ReferenceSignals:
    """(N) signals of the last of the P earlier passes at the micro-batch's masked positions. settings: alpha of the
    passes' residuals. rule: what is kept of the predictions. A row with fewer passes has no residual until its first
    one."""
    assert micro.noisier_masks is not None and micro.num_passes is not None
    temperatures = {"alpha_temperature": rule.alpha_temperature, "delta_temperature": rule.delta_temperature}
    residual: tuple[Tensor, Tensor] | None = None
    masks = [*micro.noisier_masks, micro.batch.masked]
    for number, (masked, following) in enumerate(zip(masks, masks[1:], strict=False)):
        batch = micro.batch.remasked(masked, model.mask_token_id)
        hidden = masked_hidden(model, batch, residual)  # (N', D)
        signals = encoded(model, hidden, rule.top_k, rule.keep_mass, **temperatures)[following[masked]]
        if number + 2 == len(masks):
            break
        after = micro.batch.remasked(following, model.mask_token_id)
        alpha, delta = own_residual(model, signals, after, settings)
        residual = (alpha * (micro.num_passes[following] >= len(micro.noisier_masks) - number), delta)
    return signals


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
