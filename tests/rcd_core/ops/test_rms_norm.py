"""RMSNorm of a training on CPUs against transformers' layer: values bit by bit, gradients up to rounding."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from rcd_core.ops.rms_norm import RMSNorm, use_rms_norm

Layer = torch.nn.Module


def layers(width: int) -> tuple[Layer, Layer]:
    """transformers' and ours, with the same weights."""
    theirs = Qwen3RMSNorm(width)
    ours: Layer = Qwen3RMSNorm(width)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(width, generator=torch.Generator().manual_seed(1)))
    ours.load_state_dict(theirs.state_dict())
    use_rms_norm(ours)
    assert isinstance(ours, RMSNorm)
    return theirs, ours


@pytest.mark.parametrize("shape", [(2, 7, 24), (2, 7, 4, 16), (0, 8)])
def test_values_and_gradients_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(shape, generator=generator) * 5 for _ in range(2))
    x[..., :1, :] = 0.0  # eps alone
    found = []
    for layer in layers(shape[-1]):
        leaf = x.clone().requires_grad_(True)
        y = layer(leaf)
        y.backward(upstream)
        found.append((y.detach(), leaf.grad, layer.weight.grad))
        with torch.no_grad():
            assert torch.equal(layer(x), y)
    (theirs, *expected), (ours, *grads) = found
    assert torch.equal(ours, theirs)
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_transformers_own(dtype: torch.dtype) -> None:
    theirs, ours = (layer.to(dtype) for layer in layers(24))
    x = torch.randn(3, 24, dtype=dtype, requires_grad=True)
    assert torch.equal(ours(x), theirs(x))
