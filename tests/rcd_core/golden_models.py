"""The golden checkpoints in fp64, whose numbers do not depend on the CPU's vectors or on the number of threads.

fp32 rounds differently on each kind of CPU, and residuals amplify that: over 19 passes confidences differ by up to
.0013, which is more than some distances to the threshold.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rcd_core import load_model
from rcd_core.families.base import DiffusionModel

GOLDEN = Path(__file__).parents[1] / "golden"


def load_fp64(name: str, attention: str = "sdpa") -> DiffusionModel:
    """A checkpoint below tests/golden. transformers computes norms and rotary tables in fp32, whatever the model's
    dtype; here they are fp64 too."""
    model = load_model(GOLDEN / name, dtype=torch.float64, attention=attention)
    for module in model.backbone.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module)
    model.backbone.model.rotary_emb = _Rotary(model.config)
    return model


def _norm(module: Any, x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


class _Rotary(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
        self.frequencies = config.rope_parameters["rope_theta"] ** -exponents

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None] * self.frequencies.repeat(2)
        return angles.cos(), angles.sin()
