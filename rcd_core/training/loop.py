"""One training loop for base, reference, target and baseline; they differ in where the residual comes from.

Runs with plain torch on one device, under torchrun, or inside a Ray Train worker: it only looks at torch.distributed.
Step n trains on rows [n B, (n + 1) B); rank r of W takes every W-th of them from r on, and sums are normalised over the
whole step, so the number of workers changes rounding and nothing else. Resume is a step number.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.noise import hash_key, uniforms
from rcd_core.residual import ResidualSettings
from rcd_core.signals import ReferenceSignals, residual_state
from rcd_core.training.objective import LossWeight, TrainingBatch, loss_sum, masked_hidden, normalizer
from rcd_core.training.rows import Row, RowSource, collate
from rcd_core.training.settings import TrainSettings

ONLINE_TOP_K = 32


@dataclass(frozen=True)
class Callbacks:
    """Called on every rank: log(metrics reduced over ranks); checkpoint(step, save) where save(directory) writes."""

    log: Callable[[dict[str, float]], None]
    checkpoint: Callable[[int, Callable[[Path], None]], None]


class LossModule(nn.Module):
    """What is wrapped for data parallelism: the sum of weighted losses of one micro-batch, residual included."""

    def __init__(self, model: DiffusionModel, weight: LossWeight, residual: ResidualSettings) -> None:
        super().__init__()
        self.model, self.weight, self.residual = model, weight, residual

    def forward(self, batch: TrainingBatch, signals: ReferenceSignals | None, keep: Tensor) -> tuple[Tensor, Tensor]:
        """keep (B,) is 0 for rows under residual dropout. Returns (loss sum, sum of alpha over masked positions)."""
        if signals is None:
            return loss_sum(self.model, batch, None, self.weight), torch.zeros((), device=keep.device)
        rule, scale = self.residual.alpha, self.residual.alpha_scale
        alpha, delta = residual_state(signals, self.model.embedding.weight, rule, scale)
        alpha = alpha * keep[:, None].expand_as(batch.masked)[batch.masked]
        return loss_sum(self.model, batch, (alpha, delta), self.weight), alpha.detach().sum()


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
    online_top_k: int = ONLINE_TOP_K,
    resume: Path | None = None,
) -> None:
    """Train `model` in place for settings.steps optimiser steps, from `resume` (a checkpoint directory) if given.

    residual.source "none" ignores any signals; "signals" takes the rows' cached ones; "online" asks `reference`, whose
    weights never change, for top-`online_top_k` signals at the same noisy input.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = model.device
    if settings.batch_size % world:
        raise UserError(f"train.batch_size {settings.batch_size} is no multiple of the {world} workers; change either")
    if residual.source == "online" and reference is None:
        raise UserError("residual.source is 'online' but no reference model was given")
    model.train()
    module: nn.Module = LossModule(model, settings.loss_weight, residual)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    first = _load_checkpoint(resume, model, optimizer) if resume else 0
    if world > 1:
        module = DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16")
    meter = Meter(device, first)
    last_checkpoint = first
    for step, micro_batches in _prefetched(source, settings, rank, world, first, model, block_length):
        rate = learning_rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = [(rows, batch.to(device), signals) for rows, batch, signals in micro_batches]
        parts = [normalizer(batch, model.family, settings.loss_weight).double() for _, batch, _ in batches]
        total = torch.stack(parts).sum().to(device)
        # Under way while the passes are computed: the losses are summed first and normalised afterwards.
        pending = dist.all_reduce(total, async_op=True) if world > 1 else None
        sums = []
        for i, (rows, batch, signals) in enumerate(batches):
            signals = _signals(residual, signals, reference, model, batch, online_top_k)
            synchronised = i + 1 == len(batches) or not isinstance(module, DistributedDataParallel)
            with contextlib.nullcontext() if synchronised else module.no_sync(), autocast:  # type: ignore[union-attr, operator]
                loss, alpha = module(batch, signals, _keep(rows, residual, settings).to(device))
            loss.backward()
            sums.append((loss.detach(), alpha, batch))
        if pending is not None:
            pending.wait()
        normalized = total.item()
        for loss, alpha, batch in sums:
            meter.add(loss / normalized, alpha, batch)
        # DDP averages gradients over ranks; the step's loss is a sum over ranks divided by the whole normaliser.
        torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], world / normalized)
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        if not torch.isfinite(norm):
            ids = ", ".join(r.example_id for rows, _, _ in batches for r in rows[:4])
            raise UserError(
                f"loss or gradient is not finite at step {step} (rank {rank}, rows {ids}, ...); the last good "
                f"checkpoint is that of step {last_checkpoint}: lower train.learning_rate, or look at these rows"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % settings.log_every == 0 or done == settings.steps:
            callbacks.log({"step": done, "learning_rate": rate, "grad_norm": norm.item(), **meter.flush(done)})
        if done % settings.checkpoint_every == 0 and done < settings.steps:
            callbacks.checkpoint(done, partial(save_checkpoint, model=model, optimizer=optimizer, step=done))
            last_checkpoint = done
    model.eval()


class Meter:
    """Sums between two log lines, over all ranks."""

    def __init__(self, device: torch.device, first_step: int) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, alpha, masked, tokens
        self.last_step = first_step
        self.since = time.perf_counter()

    def add(self, loss: Tensor, alpha: Tensor, batch: TrainingBatch) -> None:
        assert batch.sample_ids is not None
        counts = (batch.masked.sum(), (batch.sample_ids >= 0).sum())
        self.sums += torch.stack([loss.double(), alpha.double(), *(c.double() for c in counts)])

    def flush(self, step: int) -> dict[str, float]:
        """Means since the last flush; every rank must call it."""
        loss, alpha, masked, tokens = _all_reduce(self.sums).tolist()
        loss, self.last_step = loss / (step - self.last_step), step
        seconds = time.perf_counter() - self.since
        self.sums.zero_()
        self.since = time.perf_counter()
        return {"loss": loss, "mean_alpha": alpha / max(masked, 1.0), "tokens_per_s": tokens / seconds}


def _prefetched(
    source: RowSource,
    settings: TrainSettings,
    rank: int,
    world: int,
    first: int,
    model: DiffusionModel,
    block_length: int,
) -> Iterator[tuple[int, list[tuple[list[Row], TrainingBatch, ReferenceSignals | None]]]]:
    """The steps from `first` on, each prepared in a thread while the one before is computed."""
    share = settings.batch_size // world
    micro = min(settings.micro_batch_size or share, share)
    ids = {"mask_token_id": model.mask_token_id, "pad_token_id": model.info.pad_token_id, "block_length": block_length}

    def prepare(step: int) -> list[tuple[list[Row], TrainingBatch, ReferenceSignals | None]]:
        mine = range(step * settings.batch_size + rank, (step + 1) * settings.batch_size, world)
        rows = [source.row(g) for g in mine]
        parts = [rows[i : i + micro] for i in range(0, len(rows), micro)]
        return [(part, *collate(part, **ids)) for part in parts]

    with ThreadPoolExecutor(1, thread_name_prefix="rows") as pool:
        following = pool.submit(prepare, first) if first < settings.steps else None
        for step in range(first, settings.steps):
            assert following is not None
            current = following.result()
            following = pool.submit(prepare, step + 1) if step + 1 < settings.steps else None
            yield step, current


def _keep(rows: list[Row], residual: ResidualSettings, settings: TrainSettings) -> Tensor:
    """(B,) 0 where residual dropout strikes the row, by hash of the row's place in training."""
    if not residual.dropout:
        return torch.ones(len(rows))
    drawn = [uniforms(hash_key("residual_dropout", settings.seed, r.index), 1)[0] for r in rows]
    return torch.tensor([float(u >= residual.dropout) for u in drawn])


def _signals(
    residual: ResidualSettings,
    cached: ReferenceSignals | None,
    reference: DiffusionModel | None,
    model: DiffusionModel,
    batch: TrainingBatch,
    top_k: int,
) -> ReferenceSignals | None:
    if residual.source == "none":
        return None
    if residual.source == "online":
        assert reference is not None
        return reference_signals(reference, batch, top_k)
    if cached is None:
        raise UserError(
            "residual.source is 'signals' but the rows carry none; train on the output of the stage `signals`"
        )
    return cached.to(model.device)


@torch.no_grad()
def reference_signals(
    reference: DiffusionModel,
    batch: TrainingBatch,
    top_k: int,
    *,
    alpha_temperature: float = 1.0,
    delta_temperature: float = 1.0,
) -> ReferenceSignals:
    """The frozen reference's signals at the batch's masked positions: the same function in the cache and online."""
    hidden = masked_hidden(reference, batch, None)
    return ReferenceSignals.from_hidden(
        hidden,
        reference.lm_head_weight,
        top_k,
        alpha_temperature=alpha_temperature,
        delta_temperature=delta_temperature,
    )


def save_checkpoint(directory: Path, model: DiffusionModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights, optimiser state and the number of finished steps; a resumed run ends in the same bits."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(weights, directory / "weights.safetensors")
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    (directory / "progress.json").write_text(json.dumps({"step": step}))


def _load_checkpoint(directory: Path, model: DiffusionModel, optimizer: torch.optim.Optimizer) -> int:
    weights = load_file(directory / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    # weights_only: tensors and plain containers, nothing that can run code.
    state: dict[str, Any] = torch.load(directory / "optimizer.pt", weights_only=True, map_location=model.device)
    optimizer.load_state_dict(state)
    return int(json.loads((directory / "progress.json").read_text())["step"])


def _all_reduce(value: Tensor) -> Tensor:
    value = value.clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value
