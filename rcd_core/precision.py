"""The precision of reductions: fp32, or the input's own dtype where that is wider; and their order."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(tensor: Tensor) -> Tensor:
    """bf16, fp16 and fp32 in fp32; fp64 as it is."""
    return tensor.to(reduction_dtype(tensor.dtype))


def reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of `dtype` are summed."""
    return torch.promote_types(dtype, torch.float32)


def running_sum(values: Tensor) -> Tensor:
    """Along the last dimension, as cumsum, which has no deterministic kernel for floats on CUDA: there, if
    deterministic algorithms are asked for, sums of 1, 2, 4, ... neighbours are added in a fixed order."""
    if not (torch.are_deterministic_algorithms_enabled() and values.is_cuda):
        return values.cumsum(-1)
    return _doubled_sums(values)


def _doubled_sums(values: Tensor) -> Tensor:
    reach = 1
    while reach < values.shape[-1]:
        values = values + torch.nn.functional.pad(values[..., :-reach], (reach, 0))
        reach *= 2
    return values
