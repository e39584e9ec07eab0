"""Strategies: DDP, FSDP2 and DeepSpeed behind one small interface for parameters, gradients and optimiser state.

The loop runs forwards, passes losses that are already scaled, and steps. DDP and FSDP2 share a checkpoint format
(torch's distributed checkpoint, to which every rank writes its part), so a run can resume with another number of
workers or with the other strategy. DeepSpeed has a format of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.training.optimizers import adamw, make_optimizers, set_learning_rate
from rcd_core.training.settings import TrainSettings

PROGRESS = "progress.json"


class Strategy(ABC):
    """One module in training; the loop calls `module`.

    collective_forward: all ranks must call it equally often, because it gathers parameters. updates_blindly: step()
    does not check whether the gradient is finite, so the loop checks the loss first.
    """

    module: nn.Module
    collective_forward = False
    updates_blindly = False

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context of forward passes only."""
        return contextlib.nullcontext()

    @abstractmethod
    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of forward and backward pass of one micro-batch; last: of the optimiser step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def step(self, learning_rate: float) -> Tensor:
        """Clip, update, clear. Returns the gradient norm before clipping; no update if it is not finite."""

    @abstractmethod
    def discard(self) -> None:
        """Clear the gradients without updating."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Every rank writes its part of weights and optimiser state; `load` restores the same bits."""

    @abstractmethod
    def load(self, directory: Path) -> None: ...

    @abstractmethod
    def full_weights(self) -> dict[str, Tensor]:
        """The module's whole state on the CPU of rank 0, {} on the other ranks. Collective."""


def make_strategy(module: nn.Module, model: DiffusionModel, settings: TrainSettings, device: torch.device) -> Strategy:
    """model: the one inside `module`. UserError: conflicting settings, no process group, or DeepSpeed not installed."""
    if settings.strategy == "ddp":
        return DataParallel(module, settings, device)
    if settings.strategy == "fsdp2":
        return FullyShardedDataParallel(module, model, settings, device)
    return DeepSpeed(module, settings, device)


def compile_layers(model: DiffusionModel) -> None:
    """Compile forward() of each layer, in place. Hooks of FSDP2 and checkpointing stay outside."""
    for layer in model.backbone.model.layers:
        layer.forward = torch.compile(layer.forward)


def _require_process_group(strategy: str) -> None:
    if not dist.is_initialized():
        raise UserError(f"train.strategy is {strategy} but there is no process group; run under Ray Train or torchrun")


class _Native(Strategy):
    """Common to DDP and FSDP2: torch's optimisers, clipping and distributed checkpoint."""

    def __init__(self, module: nn.Module, settings: TrainSettings) -> None:
        self.module, self.settings = module, settings
        self.optimizers = make_optimizers(module, settings)
        self.frozen = settings.lora is not None  # what is frozen is not in checkpoints

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, learning_rate: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.settings.clip_norm)
        if hasattr(norm, "full_tensor"):  # FSDP2: not yet summed over the shards
            norm = norm.full_tensor()
        if torch.isfinite(norm):
            set_learning_rate(self.optimizers, learning_rate, self.settings)
            for optimizer in self.optimizers:
                optimizer.step()
        self.discard()
        return norm

    def discard(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(ignore_frozen_params=self.frozen)
        model, optimizer = get_state_dict(self.module, self.optimizers, options=options)
        return {"model": model, "optimizer": optimizer}

    def save(self, directory: Path) -> None:
        import torch.distributed.checkpoint as dcp

        single = not dist.is_initialized()
        dcp.save(self._state(), checkpoint_id=directory, no_dist=single)  # type: ignore[attr-defined]

    def load(self, directory: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        state, single = self._state(), not dist.is_initialized()
        dcp.load(state, checkpoint_id=directory, no_dist=single)  # type: ignore[attr-defined]
        model, optimizer = state["model"], state["optimizer"]
        options = StateDictOptions(strict=not self.frozen)
        set_state_dict(
            self.module, self.optimizers, model_state_dict=model, optim_state_dict=optimizer, options=options
        )

    def full_weights(self) -> dict[str, Tensor]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=self.frozen)
        weights: dict[str, Any] = dict(get_model_state_dict(self.module, options=options))
        return weights if not dist.is_initialized() or dist.get_rank() == 0 else {}


class DataParallel(_Native):
    """DDP: a whole replica on every worker. A single worker needs no communication."""

    def __init__(self, module: nn.Module, settings: TrainSettings, device: torch.device) -> None:
        if settings.cpu_offload:
            raise UserError(
                "train.cpu_offload is true but train.strategy is ddp, which keeps all on the device; use fsdp2"
            )
        super().__init__(module, settings)
        self.device_type = device.type
        if dist.is_initialized() and dist.get_world_size() > 1:
            devices = [device.index] if device.type == "cuda" else None
            # No training changes the buffers, and gradients need not exist twice.
            options: dict[str, Any] = {"forward_sync_buffers": False, "gradient_as_bucket_view": True}
            self.module = DistributedDataParallel(module, device_ids=devices, **options)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16")


class FullyShardedDataParallel(_Native):
    """FSDP2: gathers the parameters of each layer, of the embedding and of the head while they run. The head stays
    gathered until its backward pass, which follows at once. Where embedding and head are one parameter, it belongs to
    the root and stays gathered from the first layer to the last. With settings.shard_size, parameters are sharded
    within groups of neighbouring workers, and gradients are summed between the groups."""

    collective_forward = True

    def __init__(self, module: nn.Module, model: DiffusionModel, settings: TrainSettings, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        _require_process_group("fsdp2")
        low, world = settings.dtype == "bfloat16", dist.get_world_size()
        size = settings.shards(world)
        groups, names = ((world // size, size), ("replicate", "shard")) if size < world else ((size,), ("shard",))
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, groups, mesh_dim_names=names),
            # Master weights and the sum over workers stay in fp32.
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if low else None, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            # Each call moves what it shards to the device; with offload, the shards go back to the CPU.
            "offload_policy": CPUOffloadPolicy(device.type == "cuda") if settings.cpu_offload else OffloadPolicy(),
        }
        for layer in model.backbone.model.layers:
            fully_shard(layer, **options)
        if model.embedding.weight is not model.lm_head_weight:
            fully_shard(model.embedding, **options)
            fully_shard(model.lm_head, reshard_after_forward=False, **options)
        fully_shard(module, **options)
        super().__init__(module, settings)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        # Reduce gradients after every micro-batch: keeping them unsharded would cost what sharding saves.
        return contextlib.nullcontext()


class DeepSpeed(Strategy):
    """ZeRO 1, 2, 3, with offload. settings.deepspeed is DeepSpeed's own configuration; the loop overrides batch sizes,
    clipping and dtype."""

    collective_forward = True
    updates_blindly = True

    def __init__(self, module: nn.Module, settings: TrainSettings, device: torch.device) -> None:
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed takes any GPU that it sees
        try:
            import deepspeed
        except ImportError as error:
            raise UserError(
                "train.strategy is deepspeed but the package is not installed: pip install 'rcd-ray[deepspeed]'"
            ) from error
        _require_process_group("deepspeed")
        config = {
            "zero_optimization": {"stage": 2},
            "zero_force_ds_cpu_optimizer": False,  # the same AdamW everywhere, offloaded or not
            **settings.deepspeed,
            "train_micro_batch_size_per_gpu": 1,  # no effect: the loop makes the batches and scales the losses
            "gradient_clipping": settings.clip_norm,
            "bf16": {"enabled": settings.dtype == "bfloat16"},
            "zero_allow_untested_optimizer": True,
        }
        self.stage = int(config["zero_optimization"].get("stage", 0))
        self.plain = module
        self.engine, *_ = deepspeed.initialize(
            model=module,
            config=config,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            optimizer=lambda parameters: adamw(parameters, settings),
            dist_init_required=False,
        )
        self.module = self.engine

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        self.engine.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-batch without updating

    def step(self, learning_rate: float) -> Tensor:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return torch.as_tensor(float(self.engine.get_global_grad_norm()))

    def discard(self) -> None:
        self.engine.optimizer.zero_grad()

    def save(self, directory: Path) -> None:
        self.engine.save_checkpoint(str(directory), tag="state", save_latest=False)

    def load(self, directory: Path) -> None:
        self.engine.load_checkpoint(str(directory), tag="state")

    def full_weights(self) -> dict[str, Tensor]:
        first = dist.get_rank() == 0
        if self.stage < 3:
            return {k: v.detach().cpu() for k, v in self.plain.state_dict().items()} if first else {}
        import deepspeed

        weights = {}
        for name, parameter in self.plain.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if first:
                    weights[name] = parameter.detach().cpu().clone()
        return weights


def write_progress(directory: Path, step: int, strategy: str) -> None:
    (directory / PROGRESS).write_text(json.dumps({"step": step, "strategy": strategy}))


def read_progress(directory: Path, strategy: str) -> int:
    """Finished steps of a checkpoint; UserError if `strategy` cannot read what the other one wrote."""
    progress = json.loads((directory / PROGRESS).read_text())
    if (progress["strategy"] == "deepspeed") != (strategy == "deepspeed"):
        raise UserError(
            f"{directory}: the checkpoint was written with train.strategy {progress['strategy']}, which {strategy} "
            "cannot read; resume with the former, or start again under another run name"
        )
    return int(progress["step"])
