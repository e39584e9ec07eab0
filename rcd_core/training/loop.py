"""The training loop for base, reference, target and baseline; they differ only in the source of the residual.

Runs with plain torch on one device, under torchrun, or inside a Ray Train worker: it only uses torch.distributed.
Step n trains on rows [n B, (n + 1) B). Rank r of W takes every W-th of them from the r-th on. Losses are
normalised over the whole step, so the number of workers changes rounding only. Resuming needs just the step number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rcd_core.alpha import LearnedAlpha
from rcd_core.errors import STEP_NOTE, UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.loopholing import Loophole
from rcd_core.noise import NoiseSettings, seed_of
from rcd_core.signals import ReferenceSignals
from rcd_core.training.data.batches import Collator, MicroBatch, prefetch
from rcd_core.training.data.rows import RowSource
from rcd_core.training.lora import add_adapters
from rcd_core.training.loss_module import LossModule
from rcd_core.training.meter import Meter
from rcd_core.training.objective import Teacher, normalizer, reference_signals, teacher_of
from rcd_core.training.settings import ResidualSettings, SignalRule, TrainSettings
from rcd_core.training.strategies import Strategy, compile_layers, make_strategy, read_progress, write_progress

DEFAULT_RULE = SignalRule()


@dataclass(frozen=True)
class Callbacks:
    """Called on every rank. log(metrics) gets means over all ranks. checkpoint(step, save) decides where to save;
    save(directory) writes this rank's part and is collective. loaded(): the checkpoint to resume is not needed now."""

    log: Callable[[dict[str, float]], None]
    checkpoint: Callable[[int, Callable[[Path], None]], None]
    loaded: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Validation:
    """Rows [0, num_rows) of a held-out source; their noise is fixed."""

    source: RowSource
    num_rows: int


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Of an optimiser step: linear warm-up, then constant, cosine to 0 or linear to 0."""
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
    own_reference: bool = False,
    signal_rule: SignalRule = DEFAULT_RULE,
    noise: NoiseSettings | None = None,
    block_warmup: float = 0.0,
    validation: Validation | None = None,
    resume: Path | None = None,
    stop_at: int | None = None,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Train `model` in place for settings.steps optimiser steps.

    residual.source: "none" ignores any signals. "signals" uses those cached with the rows. "online" runs the frozen
    `reference` on the same noisy input, or with own_reference the model without its adapters, and keeps what
    `signal_rule` says. The other sources run the model itself on
    noisier versions of the rows and need `noise`, which drew the rows' own masks. settings.distill needs the reference,
    too.
    block_warmup: share of the steps in which blocks grow from one token, causal attention, to block_length.
    resume: directory of a checkpoint to continue from.
    stop_at: the last step of this part of the training, with a checkpoint at its end; None: settings.steps.
    device: where to train, by default the model's device. ddp expects the model there; fsdp2 takes a model on the CPU
    and moves it layer by layer, so that no device holds all of it.
    A model without `learned_alpha` or `loophole` gets one if the settings need it, which is trained along.
    Returns on rank 0 the weights of the backbone and of these networks on the CPU; {} on the other ranks. With
    settings.lora those that were trained (lora.merged).
    UserError: settings that contradict each other or the data, or more than train.max_skipped_steps steps whose loss
    or gradient is not finite.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if settings.batch_size % world:
        raise UserError(
            f"train.batch_size {settings.batch_size} is not a multiple of the {world} workers; change either"
        )
    if not settings.steps:
        raise UserError("train.steps is 0 because train.epochs is set; pass settings.resolved(num_examples)")
    if residual.source == "online" and reference is None and not own_reference:
        raise UserError("residual.source is 'online' but reference is None; pass the reference model")
    if (residual.needs_noisier or residual.self_share) and noise is None:
        name = f"source is {residual.source!r}" if residual.needs_noisier else f"self_share is {residual.self_share}"
        raise UserError(f"residual.{name} but noise is None; pass the noise of the rows")
    if settings.distill and reference is None and not own_reference:
        raise UserError("train.distill is true but reference is None; pass the reference model")
    if settings.distill and residual.source == "on_policy":
        raise UserError("train.distill is true but residual.source is 'on_policy', whose masks are others; set one")
    check_layout(noise, model, block_length)
    if residual.source == "loopholing" and model.shifted and not model.whole_canvas:
        raise UserError(
            "residual.source is 'loopholing', which models with shifted logits and blocks (Fast-dLLM v2) do not have: "
            "the row that knows of a block's first token belongs to the block before; choose another source"
        )
    if residual.source == "loopholing" and noise is not None and noise.layout != "single":
        raise UserError(f"residual.source is 'loopholing' but noise.layout is {noise.layout}; set it to single")
    device = device or model.device
    collator = Collator(
        settings=settings,
        residual=residual,
        mask_token_id=model.mask_token_id,
        pad_token_id=model.info.pad_token_id,
        block_length=block_length,
        block_diffusion=model.attention_block(block_length) is not None,
        noise=noise,
        block_warmup=block_warmup,
    )
    if settings.lora is not None:
        add_adapters(model, settings.lora, settings.seed)
    if not residual.learns_alpha:
        model.learned_alpha = None
    elif model.learned_alpha is None:
        model.learned_alpha = LearnedAlpha().to(model.device)
    if residual.source != "loopholing":
        model.loophole = None
    elif model.loophole is None:
        model.loophole = Loophole(model.embedding.weight.shape[1]).to(model.device)
    model.train()
    model.activation_checkpointing = settings.activation_checkpointing
    meter = Meter(model, device, 0)
    if settings.compile:
        compile_layers(model)
    uses_own = residual.source == "online" and own_reference
    own_teacher = settings.distill and own_reference
    module = LossModule(model, settings.loss_weight, residual, signal_rule if uses_own else None, own_teacher)
    strategy = make_strategy(module, model, settings, device)
    run = _Run(model, strategy, settings, residual, reference, signal_rule, world, device)
    first = 0
    if resume is not None:
        first = read_progress(resume, settings.strategy)
        strategy.load(resume)
        callbacks.loaded()
    end = settings.steps if stop_at is None else stop_at
    meter.last_step = last_checkpoint = first
    skipped = 0
    wait_start = time.perf_counter()
    done = first
    try:
        for step, micro_batches in prefetch(source, collator, rank, world, first, end):
            meter.waited += time.perf_counter() - wait_start
            rate = learning_rate(step, settings)
            if settings.lora is not None and settings.lora.dropout:
                torch.manual_seed(seed_of(settings.seed, "lora", "dropout", step, rank))
            norm = run.step(micro_batches, rate, meter)
            done = step + 1
            if not math.isfinite(norm):
                skipped += 1
                rows = [row for micro in micro_batches for row in micro.rows]
                if rows and all(row.reason for row in rows):
                    raise UserError(
                        f"none of the rows of step {step} can be trained on: {rows[0].reason} (rank {rank}, row "
                        f"{rows[0].example_id}, ...); remove such examples, or fit the model to them"
                    )
                if skipped > settings.max_skipped_steps:
                    ids = ", ".join(row.example_id for micro in micro_batches for row in micro.rows[:4])
                    raise UserError(
                        f"loss or gradient is not finite at step {step} (rank {rank}, rows {ids}, ...); the last good "
                        f"checkpoint is that of step {last_checkpoint}: lower train.learning_rate, inspect these "
                        "rows, or raise train.max_skipped_steps"
                    )
            last = done == end
            validates = validation and settings.validate_every and (done % settings.validate_every == 0 or last)
            if done % settings.log_every == 0 or last or validates:
                line = {"step": done, "learning_rate": rate, "grad_norm": norm, "skipped_steps": skipped}
                line |= meter.flush(done)
                if validation and validates:
                    line["validation_loss"] = run.validate(validation, collator, rank)
                callbacks.log(line)
            if last and end < settings.steps or done % settings.checkpoint_every == 0 and not last:
                callbacks.checkpoint(done, partial(_save, strategy, settings, rank, done))
                last_checkpoint = done
            wait_start = time.perf_counter()
    except Exception as error:
        error.add_note(f"{STEP_NOTE}{done}")
        raise
    weights = {n.removeprefix("model.").removeprefix("backbone."): w for n, w in strategy.full_weights().items()}
    model.eval()
    return weights


def check_layout(noise: NoiseSettings | None, model: DiffusionModel, block_length: int) -> None:
    """Raise UserError for a layout of the noise that the model's attention does not have."""
    if noise is None or noise.layout == "single":
        return
    name = f"noise.layout is {noise.layout}"
    if noise.block_length != block_length:
        raise UserError(
            f"{name}, whose noise.block_length {noise.block_length} must be the block_length {block_length}"
        )
    whole = model.attention_block(block_length) is None
    if whole and noise.layout == "multi_block":
        raise UserError(f"{name} but {model.family} models see the whole canvas; set it to d2f")
    if not whole and noise.layout == "d2f":
        raise UserError(f"{name} but {model.family} models see blocks; set it to multi_block")


@dataclass
class _Run:
    """Optimiser steps and validation on this rank."""

    model: DiffusionModel
    strategy: Strategy
    settings: TrainSettings
    residual: ResidualSettings
    reference: DiffusionModel | None
    signal_rule: SignalRule
    world: int
    device: torch.device

    def step(self, micro_batches: list[MicroBatch], rate: float, meter: Meter) -> float:
        """Gradient norm before clipping; not finite if the step was skipped."""
        micro_batches = [micro.to(self.device) for micro in micro_batches]
        total, pending = self._sum_over_ranks(self._normalizers(micro_batches))
        missing = 0
        if self.strategy.collective_forward and self.world > 1:
            most = torch.tensor(len(micro_batches), device=self.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            missing = int(most) - len(micro_batches)
        sums = []
        finite = torch.zeros((), device=self.device)
        # Ranks whose packing gave fewer micro-batches repeat their last one with weight 0.
        for i, micro in enumerate(micro_batches + micro_batches[-1:] * missing):
            real = i < len(micro_batches)
            with self.strategy.micro_batch(last=i + 1 == len(micro_batches) + missing):
                with self.strategy.autocast():
                    loss, statistics = self.strategy.module(micro, self._signals(micro), self._teacher(micro))
                if pending is not None:
                    pending.wait()  # overlaps with the first forward
                    pending = None
                # Strategies average gradients over ranks; the loss is a sum over ranks divided by the total.
                self.strategy.backward(loss * (self.world / total if real else 0.0))
            if real:
                sums.append((loss.detach(), statistics, micro))
                finite += loss.detach()
        if self.strategy.updates_blindly:
            finite, pending = self._sum_over_ranks(finite)
            if pending is not None:
                pending.wait()
            if not torch.isfinite(finite):
                self.strategy.discard()
                return math.nan
        for loss, statistics, micro in sums:
            meter.add(loss / total, statistics, micro)
        return float(self.strategy.step(rate))

    @torch.no_grad()
    def validate(self, validation: Validation, collator: Collator, rank: int) -> float:
        """Mean loss over the held-out rows, without residual dropout. Collective."""
        self.model.eval()
        collator = replace(collator, residual=collator.residual.without_dropout())
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        size = self.settings.batch_size // self.world
        share = [validation.source.row(g) for g in range(rank, validation.num_rows, self.world)]
        # Forwards may be collective: all ranks run equally many batches, of at least one row.
        for start in range(0, -(-validation.num_rows // self.world), size):
            rows = share[start : start + size] or share[:1]
            counted = float(start < len(share))
            for micro in collator.micro_batches(rows):
                micro = micro.to(self.device)
                with self.strategy.autocast():
                    loss, _ = self.strategy.module(micro, self._signals(micro), self._teacher(micro))
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

    def _teacher(self, micro: MicroBatch) -> Teacher | None:
        if not self.settings.distill or self.reference is None:
            return None
        return teacher_of(self.reference, micro.batch)

    def _signals(self, micro: MicroBatch) -> ReferenceSignals | None:
        if micro.noisier_masks is not None:
            return None  # the model's own
        if self.residual.source == "online" and self.reference is None:
            return None  # the model's own, without its adapters (LossModule)
        if self.residual.source == "online":
            assert self.reference is not None
            return reference_signals(self.reference, micro.batch, self.signal_rule)
        if self.residual.source != "signals":
            return None
        if micro.signals is None and any(len(row.input_ids) for row in micro.rows):
            raise UserError("residual.source is 'signals' but the rows have none; train on the signal cache")
        return micro.signals


def _save(strategy: Strategy, settings: TrainSettings, rank: int, step: int, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    strategy.save(directory)
    if rank == 0:
        write_progress(directory, step, settings.strategy)
