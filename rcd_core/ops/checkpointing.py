"""Activation checkpointing of a layer: whole, or selective, which keeps the results of the expensive operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Mode = bool | Literal["selective"]

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm")


def checkpointed(layer: Callable[[Tensor], Tensor], hidden: Tensor, mode: Mode) -> Tensor:
    """layer(hidden). mode: False keeps what autograd keeps; True keeps `hidden` and computes the layer again in the
    backward pass; "selective" keeps the results of matrix products and attention too and computes the rest again."""
    if not mode or not torch.is_grad_enabled():
        return layer(hidden)
    more: dict[str, Any] = {}
    if mode == "selective":
        more["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    result: Tensor = checkpoint(layer, hidden, use_reentrant=False, **more)
    return result


def _policy(context: Any, operation: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    name = operation.name()
    keep = name in _PRODUCTS or "attention" in name or "flash_attn" in name
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
