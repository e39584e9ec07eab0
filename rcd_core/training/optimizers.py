"""Optimisers: AdamW for everything, or Muon for the layers' matrices and AdamW for the rest.

Muon orthogonalises the momentum of a matrix (torch.optim.Muon, Newton-Schulz in bf16). Under fsdp2 the products run on
shards, whose sums are rounded in another order.

Shapes: N matrices of one shape, R <= C their sides.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from rcd_core.training.settings import TrainSettings

_AT_ONCE = 1 << 20  # most numbers of a product, unless one matrix has more


def make_optimizers(module: nn.Module, settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """Of all parameters that are trained. The first one's learning rate is settings.learning_rate."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if settings.optimizer == "adamw":
        return [adamw([p for _, p in trained], settings)]
    hidden = [p for name, p in trained if _is_hidden(name, p)]
    return [
        adamw([p for name, p in trained if not _is_hidden(name, p)], settings),
        Muon(hidden, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay),
    ]


def adamw(parameters: Any, settings: TrainSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=not settings.cpu_offload,
    )


class Muon(torch.optim.Muon):
    """torch's, with small matrices of one shape in one product, where torch makes 15 products for each: an eighth of
    the demo's step. The state is torch's, and so are the updates (nesterov), up to the rounding of bf16."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if any(type(p.data) is not Tensor for group in self.param_groups for p in group["params"]):
            return super().step(closure)  # type: ignore[no-untyped-call]  # shards of fsdp2
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for (rows, columns), parameters in by_shape.items():
                at_once = max(1, _AT_ONCE // (rows * columns))
                for start in range(0, len(parameters), at_once):
                    self._step_together(parameters[start : start + at_once], group)
        return None

    def _step_together(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """parameters: N of one shape, with gradients."""
        updates = []
        for p in parameters:
            assert p.grad is not None
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            updates.append(torch.lerp(p.grad, momentum, group["momentum"]))
        rows, columns = parameters[0].shape
        rate = group["lr"] * max(1.0, rows / columns) ** 0.5
        for p, update in zip(parameters, _orthogonalised(torch.stack(updates), group), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def _orthogonalised(updates_nrc: Tensor, group: dict[str, Any]) -> Tensor:
    """Newton-Schulz iterations, as in torch.optim.Muon. (N, R, C) or (N, C, R) -> the same in bf16."""
    a, b, c = group["ns_coefficients"]
    x = updates_nrc.bfloat16()
    if is_tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram_nrr = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram_nrr, gram_nrr, gram_nrr, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def set_learning_rate(optimizers: list[torch.optim.Optimizer], rate: float, settings: TrainSettings) -> None:
    """rate: of AdamW in this step. Muon's follows the same schedule."""
    for optimizer in optimizers:
        is_muon = isinstance(optimizer, torch.optim.Muon)
        for group in optimizer.param_groups:
            group["lr"] = rate * settings.muon_learning_rate / settings.learning_rate if is_muon else rate


def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """A matrix of a layer. Experts that are stacked in one tensor are AdamW's."""
    return ".layers." in name and parameter.ndim == 2
