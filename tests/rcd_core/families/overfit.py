"""One batch, learned by heart from residual inputs."""

from __future__ import annotations

import torch

from rcd_core import TrainingBatch, training_loss
from rcd_core.families.base import DiffusionModel
from rcd_core.training.objective import reference_signals
from rcd_core.training.settings import SignalRule


def overfit(model: DiffusionModel, largest_id: int, steps: int) -> float:
    """Last loss / first loss. The signals are those of the model before the training."""
    model.requires_grad_(True).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, largest_id, (2, 16), generator=generator)
    masked = torch.rand(ids.shape, generator=generator) < 0.5
    noisy = ids.masked_fill(masked, model.mask_token_id)
    batch = TrainingBatch(ids, ids, noisy, masked, torch.full(ids.shape, 0.5), 4)
    signals = reference_signals(model, batch, SignalRule(top_k=8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = training_loss(model, batch, signals, weight="uniform")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] / losses[0]
