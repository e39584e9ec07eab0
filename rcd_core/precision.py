"""The precision of reductions: fp32, or the input's own dtype where that is wider."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(tensor: Tensor) -> Tensor:
    """bf16, fp16 and fp32 in fp32; fp64 as it is."""
    return tensor.to(reduction_dtype(tensor.dtype))


def reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of `dtype` are summed."""
    return torch.promote_types(dtype, torch.float32)
