"""What tells the checkpoints of a served model apart, whatever paths and nodes they were loaded from."""

from __future__ import annotations

import hashlib

import torch

from rcd_core.families.base import DiffusionModel

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def weights_id(model: DiffusionModel) -> str:
    """16 hex digits: the same for the same weights and settings in the same precision, on any device.

    Weights enter by the sum of their bits, per tensor: exact in any order, and quick where they lie. That two trainings
    agree in every sum is as good as impossible; it is no protection against someone who wants them to.
    """
    told = hashlib.sha256(repr(model.info).encode())
    for name, weights in model.named_parameters():
        bits = weights.detach().view(_INTEGERS[weights.element_size()])
        told.update(f"{name} {tuple(weights.shape)} {weights.dtype} {int(bits.sum(dtype=torch.int64))}".encode())
    return told.hexdigest()[:16]
