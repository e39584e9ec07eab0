"""One training loop for base, reference, target and baseline; they differ in where the residual comes from.

Runs with plain torch on one device, under torchrun, or inside a Ray Train worker: it only looks at torch.distributed.
Step n trains on rows [n B, (n + 1) B); rank r of W takes every W-th of them from r on, and sums are normalised over the
whole step, so the number of workers changes rounding and nothing else. Resume is a step number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rcd_core.alpha import LearnedAlpha
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.noise import NoiseSettings
from rcd_core.residual import ResidualSettings
from rcd_core.signals import ReferenceSignals
from rcd_core.training.data.batches import Collator, MicroBatch, prefetch
from rcd_core.training.data.rows import RowSource
from rcd_core.training.loss_module import LossModule
from rcd_core.training.meter import Meter
from rcd_core.training.objective import normalizer, reference_signals
from rcd_core.training.settings import SignalRule, TrainSettings
from rcd_core.training.strategies import Strategy, make_strategy, read_progress, write_progress

DEFAULT_RULE = SignalRule()


@dataclass(frozen=True)
class Callbacks:
    """Called on every rank: log(metrics, summed over ranks); checkpoint(step, save), where save(directory) writes this
    rank's part and is collective."""

    log: Callable[[dict[str, float]], None]
    checkpoint: Callable[[int, Callable[[Path], None]], None]


@dataclass(frozen=True)
class Validation:
    """Held-out rows [0, num_rows) of a source, with their fixed noise."""

    source: RowSource
    num_rows: int


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then constant, cosine to 0 or linear to 0."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, settings.steps - warm)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return settings.learning_rate * factor[settings.schedule]


def train(
    model: DiffusionModel,
    source: RowSource,
    settings: TrainSettings,
    residual: ResidualSettings,
    block_length: int,
    callbacks: Callbacks,
    *,
    reference: DiffusionModel | None = None,
    signal_rule: SignalRule = DEFAULT_RULE,
    noise: NoiseSettings | None = None,
    validation: Validation | None = None,
    resume: Path | None = None,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Train `model` in place for settings.steps optimiser steps, from `resume` (a checkpoint directory) if given.

    residual.source "none" ignores any signals; "signals" takes the rows' cached ones; "online" asks `reference`, whose
    weights never change, at the same noisy input and keeps of its answer what `signal_rule` says; "self", "self_same"
    and "on_policy" run the model itself on noisier versions of the rows, drawn by `noise`, the rows' own.
    device: where training runs, the model's by default. fsdp2 takes a model that is still on the CPU there layer by
    layer, so that it is never whole on a device; ddp wants it there.
    Where alpha is learned, `model.learned_alpha` is trained along, made here if the model has none.
    Returns the backbone's weights, and learned_alpha's, on CPU on rank 0, {} on the others. UserError for what settings
    or data rule out.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if settings.batch_size % world:
        raise UserError(f"train.batch_size {settings.batch_size} is no multiple of the {world} workers; change either")
    if not settings.steps:
        raise UserError("train.steps is not known yet: epochs are given; settings.resolved(number of examples) says it")
    if residual.source == "online" and reference is None:
        raise UserError("residual.source is 'online' but no reference model was given")
    if residual.runs_model and noise is None:
        raise UserError(f"residual.source is {residual.source!r}, which needs the noise of the rows; none was given")
    device = device or model.device
    collator = Collator(
        settings=settings,
        residual=residual,
        mask_token_id=model.mask_token_id,
        pad_token_id=model.info.pad_token_id,
        block_length=block_length,
        block_diffusion=model.attention_block(block_length) is not None,
        noise=noise,
    )
    if not residual.learns_alpha:
        model.learned_alpha = None
    elif model.learned_alpha is None:
        model.learned_alpha = LearnedAlpha().to(model.device)
    model.train()
    model.activation_checkpointing = settings.activation_checkpointing
    meter = Meter(model, device, 0)
    module = LossModule(model, settings.loss_weight, residual)
    strategy = make_strategy(module, model.backbone.model.layers, settings, device)
    run = _Run(model, strategy, settings, residual, reference, signal_rule, world, device)
    first = 0
    if resume is not None:
        first = read_progress(resume, settings.strategy)
        strategy.load(resume)
    meter.last_step = last_checkpoint = first
    skipped = 0
    waiting = time.perf_counter()
    for step, micro_batches in prefetch(source, collator, rank, world, first):
        meter.waited += time.perf_counter() - waiting
        rate = learning_rate(step, settings)
        norm = run.step(micro_batches, rate, meter)
        done = step + 1
        if not math.isfinite(norm):
            skipped += 1
            if skipped > settings.max_skipped_steps:
                ids = ", ".join(row.example_id for micro in micro_batches for row in micro.rows[:4])
                raise UserError(
                    f"loss or gradient is not finite at step {step} (rank {rank}, rows {ids}, ...); the last good "
                    f"checkpoint is that of step {last_checkpoint}: lower train.learning_rate, look at these rows, or "
                    "allow some with train.max_skipped_steps"
                )
        last = done == settings.steps
        validates = validation and settings.validate_every and (done % settings.validate_every == 0 or last)
        if done % settings.log_every == 0 or last or validates:
            line = {
                "step": done,
                "learning_rate": rate,
                "grad_norm": norm,
                "skipped_steps": skipped,
                **meter.flush(done),
            }
            if validation and validates:
                line["validation_loss"] = run.validate(validation, collator, rank)
            callbacks.log(line)
        if done % settings.checkpoint_every == 0 and done < settings.steps:
            callbacks.checkpoint(done, lambda directory, done=done: _save(strategy, directory, done, settings, rank))  # type: ignore[misc]
            last_checkpoint = done
        waiting = time.perf_counter()
    weights = {n.removeprefix("model.").removeprefix("backbone."): w for n, w in strategy.full_weights().items()}
    model.eval()
    return weights


class _Run:
    """One optimiser step, and validation, on this rank."""

    def __init__(
        self,
        model: DiffusionModel,
        strategy: Strategy,
        settings: TrainSettings,
        residual: ResidualSettings,
        reference: DiffusionModel | None,
        rule: SignalRule,
        world: int,
        device: torch.device,
    ) -> None:
        self.model, self.strategy, self.settings, self.residual = model, strategy, settings, residual
        self.reference, self.rule, self.world, self.device = reference, rule, world, device

    def step(self, micro_batches: list[MicroBatch], rate: float, meter: Meter) -> float:
        """The gradient norm; not finite if there was no update."""
        micro_batches = [micro.to(self.device) for micro in micro_batches]
        total, pending = self._sum_over_ranks(self._normalizers(micro_batches))
        missing = 0
        if self.strategy.collective_forward and self.world > 1:
            most = torch.tensor(len(micro_batches), device=self.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            missing = int(most) - len(micro_batches)
        sums = []
        finite = torch.zeros((), device=self.device)
        # Ranks whose packing gave fewer micro-batches run their last one again, for nothing.
        for i, micro in enumerate(micro_batches + micro_batches[-1:] * missing):
            real = i < len(micro_batches)
            with self.strategy.micro_batch(last=i + 1 == len(micro_batches) + missing):
                with self.strategy.autocast():
                    loss, statistics = self.strategy.module(micro, self._signals(micro))
                if pending is not None:
                    pending.wait()  # was under way during the first forward
                    pending = None
                # Gradients are averaged over ranks; the step's loss is a sum over ranks by the whole normaliser.
                self.strategy.backward(loss * (self.world / total if real else 0.0))
            if real:
                sums.append((loss.detach(), statistics, micro))
                finite += loss.detach()
        if self.strategy.updates_blindly:
            finite, waiting = self._sum_over_ranks(finite)
            if waiting is not None:
                waiting.wait()
            if not torch.isfinite(finite):
                self.strategy.discard()
                return math.nan
        for loss, statistics, micro in sums:
            meter.add(loss / total, statistics, micro)
        return float(self.strategy.step(rate))

    @torch.no_grad()
    def validate(self, validation: Validation, collator: Collator, rank: int) -> float:
        """Mean loss over the held-out rows, without dropout; collective."""
        self.model.eval()
        collator = Collator(**{**vars(collator), "residual": collator.residual.without_dropout()})
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        size = self.settings.batch_size // self.world
        mine = [validation.source.row(g) for g in range(rank, validation.num_rows, self.world)]
        # All ranks make the same number of batches of one row each at least: forwards may be collective.
        for start in range(0, -(-validation.num_rows // self.world), size):
            rows = mine[start : start + size] or mine[:1]
            counted = float(start < len(mine))
            for micro in collator.micro_batches(rows):
                micro = micro.to(self.device)
                with self.strategy.autocast():
                    loss, _ = self.strategy.module(micro, self._signals(micro))
                sums += counted * torch.stack([loss.double(), self._normalizers([micro])])
        if self.world > 1:
            dist.all_reduce(sums)
        self.model.train()
        return float(sums[0] / sums[1])

    def _normalizers(self, micro_batches: list[MicroBatch]) -> Tensor:
        parts = [normalizer(m.batch, self.model.family, self.settings.loss_weight).double() for m in micro_batches]
        return torch.stack(parts).sum().to(self.device)

    def _sum_over_ranks(self, value: Tensor) -> tuple[Tensor, dist.Work | None]:
        return value, dist.all_reduce(value, async_op=True) if self.world > 1 else None

    def _signals(self, micro: MicroBatch) -> ReferenceSignals | None:
        if self.residual.source == "online":
            assert self.reference is not None
            return reference_signals(self.reference, micro.batch, **vars(self.rule))
        if self.residual.source != "signals":
            return None
        if micro.signals is None and any(len(row.input_ids) for row in micro.rows):
            raise UserError(
                "residual.source is 'signals' but the rows carry none; train on the output of the stage `signals`"
            )
        return micro.signals


def _save(strategy: Strategy, directory: Path, step: int, settings: TrainSettings, rank: int) -> None:
    """This rank's part of weights and optimiser state; a resumed run ends in the same bits."""
    directory.mkdir(parents=True, exist_ok=True)
    strategy.save(directory)
    if rank == 0:
        write_progress(directory, step, settings.strategy)
