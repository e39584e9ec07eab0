"""Settings of a training stage's optimiser, and of what is kept of a reference's predictions. Loads without torch.

The residual's own settings are ResidualSettings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rcd_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """batch_size: rows of one optimiser step over all workers.

    steps: optimiser steps; or epochs: passes over the training examples, which `resolved` turns into steps (0 until
    then). Exactly one of the two is set.
    micro_batch_size: rows per worker and pass; None is the worker's whole share. More rows are accumulated.
    pack_length: tokens of a packed row; None: one sample per row, padded.
    warmup: share of the steps in which the learning rate rises linearly.
    loss_weight: "inverse_t" is the paper's 1/t, "uniform" weighs all masked tokens alike.
    dtype: of the passes; master weights are fp32.
    strategy: ddp (replicas), fsdp2 (shards) or deepspeed, configured by `deepspeed`. cpu_offload: fsdp2 only.
    attention: sdpa; flex or flash (an extra) on GPUs; eager for comparison (attention/backends.py).
    activation_checkpointing: compute layers again in the backward pass.
    max_skipped_steps: steps whose loss or gradient is not finite that may be skipped before training fails.
    checkpoint_every, log_every, validate_every (None: never): in steps.
    UserError: a value out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}

    steps: int = 0
    epochs: float | None = None
    batch_size: int
    micro_batch_size: int | None = None
    pack_length: int | None = None
    learning_rate: float = 1e-5
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: float = 0.03
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0
    loss_weight: Literal["inverse_t", "uniform"] = "inverse_t"
    dtype: Literal["float32", "bfloat16"] = "float32"
    strategy: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    deepspeed: dict[str, Any] = field(default_factory=dict)
    cpu_offload: bool = False
    attention: Literal["sdpa", "eager", "flex", "flash"] = "sdpa"
    activation_checkpointing: bool = False
    max_skipped_steps: int = 0
    validate_every: int | None = None
    checkpoint_every: int = 500
    log_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs is not None and not self.epochs > 0:
            raise UserError(f"train.epochs is {self.epochs}; it must be above 0, or null if steps is set")
        if self.epochs is not None and self.steps:
            raise UserError(f"train.epochs is {self.epochs} and train.steps {self.steps}; set epochs null or steps 0")
        if self.epochs is None and self.steps < 1:
            raise UserError(f"train.steps is {self.steps}; it must be at least 1, or set train.epochs")
        optional = ("micro_batch_size", "pack_length", "validate_every")
        for name in ("batch_size", "checkpoint_every", "log_every", *optional):
            value = getattr(self, name)
            if value is not None and value < 1:
                allowed = "at least 1, or null" if name in optional else "at least 1"
                raise UserError(f"train.{name} is {value}; it must be {allowed}")
        for name, valid, range_ in (
            ("max_skipped_steps", self.max_skipped_steps >= 0, "be at least 0"),
            ("learning_rate", self.learning_rate > 0, "be above 0"),
            ("warmup", 0.0 <= self.warmup < 1.0, "lie in [0, 1): a share of the steps"),
            ("clip_norm", self.clip_norm > 0, "be above 0"),
        ):
            if not valid:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must {range_}")

    def resolved(self, num_examples: int) -> TrainSettings:
        """These settings with steps instead of epochs: `epochs` passes, rounded up to whole batches."""
        if self.epochs is None:
            return self
        steps = max(1, math.ceil(self.epochs * num_examples / self.batch_size))
        return replace(self, steps=steps, epochs=None)


@dataclass(frozen=True, kw_only=True)
class SignalRule:
    """What is kept of a reference's predictions, per masked position.

    top_k: entries. keep_mass: of these only as many as reach this probability; None: all.
    alpha_temperature, delta_temperature: divide the logits for the entropy and for the kept probabilities.
    """

    top_k: int = 32
    keep_mass: float | None = None
    alpha_temperature: float = 1.0
    delta_temperature: float = 1.0
