"""TrainSettings: the optimiser side of a training stage. What is learned (plain or residual) is ResidualSettings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rcd_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One optimiser step sees `batch_size` rows in all, whatever the number of workers.

    steps: optimiser steps; or epochs: passes over the training examples, which `resolved` turns into steps once their
    number is known (until then steps is 0). One of the two is given. warmup: share of the steps with linearly rising
    learning rate. micro_batch_size: rows a worker holds at once (None: its whole share); the rest is gradient
    accumulation. pack_length: tokens of a packed row, into which samples are put one after another (None: one sample
    per row, padded). loss_weight: "inverse_t" is
    the paper's 1/t, "uniform" counts every masked token once. dtype: of the passes; master weights are fp32.
    strategy: ddp (all on each worker), fsdp2 or deepspeed (its configuration under `deepspeed`, passed on).
    cpu_offload: fsdp2's. activation_checkpointing: layers are computed again in the backward pass.
    max_skipped_steps: steps with a loss or gradient that is not finite that are left out before giving up.
    checkpoint_every, log_every, validate_every (None: never): in steps.
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
    activation_checkpointing: bool = False
    max_skipped_steps: int = 0
    validate_every: int | None = None
    checkpoint_every: int = 500
    log_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs is not None and not self.epochs > 0:
            raise UserError(f"train.epochs is {self.epochs}; it must be above 0, or null where steps are given")
        if self.epochs is not None and self.steps:
            raise UserError(f"train.epochs is {self.epochs} and train.steps {self.steps}; set epochs null or steps 0")
        if self.epochs is None and self.steps < 1:
            raise UserError(f"train.steps is {self.steps}; it must be at least 1, or give train.epochs instead")
        for name in ("batch_size", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("micro_batch_size", "pack_length", "validate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"train.{name} is {value}; it must be at least 1, or null")
        if self.max_skipped_steps < 0:
            raise UserError(f"train.max_skipped_steps is {self.max_skipped_steps}; it must be at least 0")
        if not self.learning_rate > 0:
            raise UserError(f"train.learning_rate is {self.learning_rate}; it must be above 0")
        if not 0.0 <= self.warmup < 1.0:
            raise UserError(f"train.warmup is {self.warmup}; it is a share of the steps, in [0, 1)")
        if not self.clip_norm > 0:
            raise UserError(f"train.clip_norm is {self.clip_norm}; it must be above 0")

    def resolved(self, num_examples: int) -> TrainSettings:
        """These settings with steps: as many whole batches as `epochs` passes over num_examples make, at least one."""
        if self.epochs is None:
            return self
        steps = max(1, math.ceil(self.epochs * num_examples / self.batch_size))
        return replace(self, steps=steps, epochs=None)


@dataclass(frozen=True, kw_only=True)
class SignalRule:
    """top_k: entries kept per masked position. keep_mass: of these only as many as reach this probability, null: all.

    alpha_temperature divides the logits behind the entropy, delta_temperature those behind the kept probabilities.
    """

    top_k: int = 32
    keep_mass: float | None = None
    alpha_temperature: float = 1.0
    delta_temperature: float = 1.0
