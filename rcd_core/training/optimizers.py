"""Optimisers: AdamW for everything, or Muon for the layers' matrices and AdamW for the rest.

Muon orthogonalises the momentum of a matrix (torch.optim.Muon, Newton-Schulz in bf16). Under fsdp2 the products run on
shards, whose sums are rounded in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rcd_core.training.settings import TrainSettings


def make_optimizers(module: nn.Module, settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """Of all parameters that are trained. The first one's learning rate is settings.learning_rate."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if settings.optimizer == "adamw":
        return [adamw([p for _, p in trained], settings)]
    hidden = [p for name, p in trained if _is_hidden(name, p)]
    return [
        adamw([p for name, p in trained if not _is_hidden(name, p)], settings),
        torch.optim.Muon(hidden, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay),
    ]


def adamw(parameters: Any, settings: TrainSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=not settings.cpu_offload,
    )


def set_learning_rate(optimizers: list[torch.optim.Optimizer], rate: float, settings: TrainSettings) -> None:
    """rate: of AdamW in this step. Muon's follows the same schedule."""
    for optimizer in optimizers:
        is_muon = isinstance(optimizer, torch.optim.Muon)
        for group in optimizer.param_groups:
            group["lr"] = rate * settings.muon_learning_rate / settings.learning_rate if is_muon else rate


def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """A matrix of a layer. Experts that are stacked in one tensor are AdamW's."""
    return ".layers." in name and parameter.ndim == 2
