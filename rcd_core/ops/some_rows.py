"""A layer whose MLP runs for some tokens only: of the last layer, training reads no others.

Shapes: B rows, Q tokens, N tokens that are read, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn


def with_mlp_at(mlp: nn.Module, at: Tensor, layer: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """layer(hidden) (B, Q, D), which calls `mlp` with all tokens. at (N,): of the B Q tokens, each once; the others'
    results are without the MLP."""
    before: Any = mlp.__dict__.get("forward")
    mlp.forward = partial(_at, mlp.forward, at)
    try:
        return layer(hidden)
    finally:
        del mlp.forward
        if before is not None:
            mlp.forward = before


def _at(forward: Callable[[Tensor], Tensor], at: Tensor, hidden: Tensor) -> Tensor:
    some = forward(hidden.flatten(0, 1)[at][None])[0]
    every = some.new_zeros(hidden.shape).flatten(0, 1)
    return every.index_copy_(0, at, some).view_as(hidden)
