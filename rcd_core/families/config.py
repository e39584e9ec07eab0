"""Sizes of a model with fresh weights: the `start: {...}` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rcd_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """head_dim None: hidden_size / num_heads. Raises UserError for sizes that do not fit together."""

    __pydantic_config__ = {"extra": "forbid"}

    family: Literal["sdar", "llada"]
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    max_positions: int = 2048
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "max_positions"):
            if getattr(self, name) < 1:
                raise UserError(f"start.{name} is {getattr(self, name)}; it must be at least 1")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise UserError(
                f"start.hidden_size {self.hidden_size} is not divisible by start.num_heads; set start.head_dim"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"start.num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}")
        if self.resolved_head_dim % 2:
            raise UserError(f"start.head_dim is {self.resolved_head_dim}; rotary embeddings need an even number")

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads
