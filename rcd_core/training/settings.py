"""Settings of a training stage's optimiser, of its residuals, and of what is kept of a reference's predictions. Loads
without torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rcd_core.decode_settings import AlphaRule
from rcd_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters instead of the weights: W + (alpha / rank) B A. modules: the linear layers that get them.

    UserError: a value out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"train.lora.rank is {self.rank}; it must be at least 1")
        if not self.alpha > 0:
            raise UserError(f"train.lora.alpha is {self.alpha}; it must be above 0")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"train.lora.dropout is {self.dropout}; it must lie in [0, 1)")
        if not self.modules:
            raise UserError("train.lora.modules is empty; name the layers that get adapters")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """batch_size: rows of one optimiser step over all workers.

    steps: optimiser steps; or epochs: passes over the training examples, which `resolved` turns into steps (0 until
    then). Exactly one of the two is set.
    micro_batch_size: rows per worker and pass; None is the worker's whole share. More rows are accumulated.
    pack_length: tokens of a packed row; None: one sample per row, padded.
    optimizer: "adamw", or "muon" for the matrices of the layers and AdamW for the rest (ddp and fsdp2, without lora).
    muon_learning_rate: Muon's, with the same schedule as learning_rate, which is AdamW's then.
    warmup: share of the steps in which the learning rate rises linearly.
    loss_weight: "inverse_t" is the paper's 1/t, "uniform" weighs all masked tokens alike, "self_normalized" divides
    by the sum of the weights 1/t, as MultiTF does, "inverse_t_mean" by the number of masked tokens, as D2F does.
    distill: learn the reference's predictions from the same noisy tokens instead of the labels (D2F's distillation).
    dtype: of the passes; master weights are fp32.
    strategy: ddp (replicas), fsdp2 (shards) or deepspeed, configured by `deepspeed`. shard_size: fsdp2 only, the
    number of neighbouring workers that hold one copy of the parameters, for example those of a node; each such group is
    a replica. None: all workers. cpu_offload: fsdp2 only.
    attention: sdpa; flex or flash (an extra) on GPUs; eager for comparison (attention/backends.py).
    activation_checkpointing: true computes layers again in the backward pass; "selective" keeps the results of their
    matrix products and attention, and computes the rest again.
    compile: compile the layers one by one; for GPUs.
    lora: train adapters instead of the weights; ddp and fsdp2 only.
    max_skipped_steps: steps whose loss or gradient is not finite that may be skipped before training fails.
    checkpoint_every, log_every, validate_every (None: never): in steps. keep_checkpoints: the last ones, of which the
    others replace a damaged one.
    UserError: a value out of range.
    """

    __pydantic_config__ = {"extra": "forbid"}

    steps: int = 0
    epochs: float | None = None
    batch_size: int
    micro_batch_size: int | None = None
    pack_length: int | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-5
    muon_learning_rate: float = 0.02
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: float = 0.03
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0
    loss_weight: Literal["inverse_t", "inverse_t_mean", "uniform", "self_normalized"] = "inverse_t"
    distill: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    strategy: Literal["ddp", "fsdp2", "deepspeed"] = "ddp"
    deepspeed: dict[str, Any] = field(default_factory=dict)
    shard_size: int | None = None
    cpu_offload: bool = False
    attention: Literal["sdpa", "eager", "flex", "flash"] = "sdpa"
    activation_checkpointing: bool | Literal["selective"] = False
    compile: bool = False
    lora: LoraSettings | None = None
    max_skipped_steps: int = 0
    validate_every: int | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs is not None and not self.epochs > 0:
            raise UserError(f"train.epochs is {self.epochs}; it must be above 0, or null if steps is set")
        if self.epochs is not None and self.steps:
            raise UserError(f"train.epochs is {self.epochs} and train.steps {self.steps}; set epochs null or steps 0")
        if self.epochs is None and self.steps < 1:
            raise UserError(f"train.steps is {self.steps}; it must be at least 1, or set train.epochs")
        optional = ("micro_batch_size", "pack_length", "validate_every", "shard_size")
        for name in ("batch_size", "checkpoint_every", "keep_checkpoints", "log_every", *optional):
            value = getattr(self, name)
            if value is not None and value < 1:
                allowed = "at least 1, or null" if name in optional else "at least 1"
                raise UserError(f"train.{name} is {value}; it must be {allowed}")
        for name, valid, range_ in (
            ("max_skipped_steps", self.max_skipped_steps >= 0, "be at least 0"),
            ("learning_rate", self.learning_rate > 0, "be above 0"),
            ("muon_learning_rate", self.muon_learning_rate > 0, "be above 0"),
            ("warmup", 0.0 <= self.warmup < 1.0, "lie in [0, 1): a share of the steps"),
            ("clip_norm", self.clip_norm > 0, "be above 0"),
            ("weight_decay", self.weight_decay >= 0.0, "be at least 0"),
            ("betas", all(0.0 <= beta < 1.0 for beta in self.betas), "be two numbers in [0, 1)"),
        ):
            if not valid:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must {range_}")

        if self.shard_size is not None and self.strategy != "fsdp2":
            raise UserError(
                f"train.shard_size is {self.shard_size} but train.strategy is {self.strategy}; use fsdp2 or null"
            )

        if self.cpu_offload and self.strategy != "fsdp2":
            other = "use fsdp2"
            if self.strategy == "deepspeed":
                other += ", or zero_optimization.offload_optimizer in train.deepspeed"
            raise UserError(f"train.cpu_offload is true but train.strategy is {self.strategy}; {other}")

        if self.optimizer == "muon" and self.strategy == "deepspeed":
            raise UserError("train.optimizer is muon but train.strategy is deepspeed; use ddp or fsdp2")

        if self.optimizer == "muon" and self.lora:
            raise UserError("train.optimizer is muon but train.lora is given, whose adapters AdamW trains; set one")

        if self.lora and self.strategy == "deepspeed":
            raise UserError("train.lora is given but train.strategy is deepspeed; use ddp or fsdp2")

        if self.compile and (self.strategy == "deepspeed" or self.activation_checkpointing == "selective"):
            other = "strategy is deepspeed" if self.strategy == "deepspeed" else "activation_checkpointing is selective"
            raise UserError(
                f"train.compile is true but train.{other}, which does not see into compiled layers; set one"
            )

    def shards(self, workers: int) -> int:
        """Workers that share one copy of the parameters under fsdp2. UserError if the groups would be unequal."""
        size = min(self.shard_size or workers, workers)
        if workers % size:
            raise UserError(
                f"train.shard_size is {self.shard_size}, which does not divide {workers} workers; change one"
            )
        return size

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


@dataclass(frozen=True, kw_only=True)
class ResidualSettings:
    """How a target is trained with residuals.

    source: "signals" (cached reference signals), "online" (the reference runs inside the step), "none" (plain masked
    SFT), "self" (no reference: one or two passes of the target itself on nested, noisier inputs) or "loopholing" (not
    RCD: a pass gets the hidden states of the one before, rcd_core/loopholing.py). Two are controls of experiments:
    "self_same" (self-residual on the same input) and "on_policy" (no residual, but masks as the target's own passes
    leave them).
    alpha_scale: nats, for the rules calibrated_entropy, uniform and learned; None takes `alpha_quantile` of the
    signals' entropies. top_k: ids of the signals that are used, None for all; the rest joins the tail.
    dropout: share of samples that are trained with alpha = 0, an extension for the zero start; the paper has 0.
    self_share: share of the steps that take self-residual in place of the reference's signals.
    """

    __pydantic_config__ = {"extra": "forbid"}

    source: Literal["signals", "online", "none", "self", "self_same", "on_policy", "loopholing"] = "signals"
    alpha: AlphaRule = "normalized_entropy"
    alpha_scale: float | None = None
    alpha_quantile: float = 0.999
    top_k: int | None = None
    dropout: float = 0.25
    self_share: float = 0.0

    @property
    def feeds_back(self) -> bool:
        """Whether the model learns to read what is fed back, so that decoding it so makes sense."""
        return self.source not in ("none", "on_policy")

    @property
    def has_alpha(self) -> bool:
        """Whether what is fed back are distributions, weighted by alpha."""
        return self.feeds_back and self.source != "loopholing"

    @property
    def learns_alpha(self) -> bool:
        return self.feeds_back and self.alpha == "learned"

    @property
    def runs_model(self) -> bool:
        """Whether a step first runs the model in training without gradient."""
        return self.needs_noisier or self.source == "loopholing"

    @property
    def needs_noisier(self) -> bool:
        """Whether it does so on noisier versions of the rows."""
        return self.source in ("self", "self_same", "on_policy")

    def without_dropout(self) -> ResidualSettings:
        return replace(self, dropout=0.0)

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout <= 1.0:
            raise UserError(f"residual.dropout is {self.dropout}; it must lie in [0, 1]")
        if not 0.0 <= self.self_share <= 1.0:
            raise UserError(f"residual.self_share is {self.self_share}; it must lie in [0, 1]")
        if self.self_share and self.source not in ("signals", "online"):
            raise UserError(
                f"residual.self_share is {self.self_share} but source is {self.source!r}, which has no signals to mix "
                "with; set it to 0"
            )
        if self.alpha_scale is not None and not self.alpha_scale > 0.0:
            raise UserError(f"residual.alpha_scale is {self.alpha_scale}; it must be above 0 (nats)")
        if not 0.0 < self.alpha_quantile <= 1.0:
            raise UserError(f"residual.alpha_quantile is {self.alpha_quantile}; it must lie in (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"residual.top_k is {self.top_k}; it must be at least 1, or null for all ids")
        if self.source == "loopholing":
            for name, default in (("alpha", "normalized_entropy"), ("alpha_scale", None), ("top_k", None)):
                if getattr(self, name) != default:
                    raise UserError(
                        f"residual.{name} is {getattr(self, name)!r} but source is 'loopholing', which feeds back "
                        f"states and no distributions; set it to {default or 'null'}"
                    )
        if self.alpha == "ramp":
            raise UserError("residual.alpha is 'ramp', which depends on the pass number; train with another rule")
