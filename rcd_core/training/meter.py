"""Training metrics between two log lines, summed over the workers.

MFU counts 6 FLOPs per parameter of the layers and token that enters them, and 6 V D per masked token for the head. Not
counted: [noisy | clean] blocks that were dropped, and what activation checkpointing computes twice.
"""

from __future__ import annotations

import resource
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor

from rcd_core.families.base import DiffusionModel
from rcd_core.families.experts import Experts
from rcd_core.training.data.batches import MicroBatch
from rcd_core.training.loss_module import NUM_BUCKETS, NUM_STATISTICS

# Dense bf16 FLOP/s from the vendors' data sheets, by a part of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "B200": 2250e12}


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s of a known GPU; None for other devices, which get no MFU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class Meter:
    def __init__(self, model: DiffusionModel, device: torch.device, first_step: int) -> None:
        shared = {id(p): p for p in (model.embedding.weight, model.lm_head_weight)}
        self.layer_parameters = model.num_parameters() - sum(p.numel() for p in shared.values())
        if (experts := Experts.of(model.config)) is not None:  # a token meets few of them
            idle = (experts.columns - experts.active_columns) * 3 * model.config.hidden_size
            self.layer_parameters -= (model.config.num_hidden_layers - experts.dense_layers) * idle
        self.head_parameters = model.lm_head_weight.numel()
        self.device, self.peak = device, peak_flops(device)
        self.last_step, self.since, self.waited = first_step, time.perf_counter(), 0.0
        self.sums = torch.zeros(3 + NUM_STATISTICS, dtype=torch.float64, device=self.device)

    def add(self, loss: Tensor, statistics: Tensor, micro: MicroBatch) -> None:
        """One micro-batch's normalised loss and the statistics (NUM_STATISTICS,) of LossModule."""
        counts = torch.stack([micro.batch.masked.sum(), (micro.batch.sample_ids >= 0).sum()])
        self.sums += torch.cat([loss.double()[None], counts.double(), statistics])

    def flush(self, step: int) -> dict[str, float]:
        """Means since the last flush. Collective.

        loss (as the optimiser sees it), loss_p0 ... (cross entropy in nats by masking probability), mean_alpha,
        tokens_per_s (clean tokens of all workers), data_wait_share, peak_memory_gib, and mfu for known GPUs.
        """
        seconds = time.perf_counter() - self.since
        world = dist.get_world_size() if dist.is_initialized() else 1
        total = self.sums.clone()
        if world > 1:
            dist.all_reduce(total)
        loss, masked, tokens, alpha, entered, *buckets = total.tolist()
        metrics = {
            "loss": loss / (step - self.last_step),
            "mean_alpha": alpha / max(masked, 1.0),
            "tokens_per_s": tokens / seconds,
            "data_wait_share": self.waited / seconds,
            "peak_memory_gib": self._peak_memory() / 2**30,
        }
        for i, (value, count) in enumerate(zip(buckets[:NUM_BUCKETS], buckets[NUM_BUCKETS:], strict=True)):
            if count:
                metrics[f"loss_p{i / NUM_BUCKETS:g}"] = value / count
        if self.peak:
            flops = 6.0 * (self.layer_parameters * entered + self.head_parameters * masked)
            metrics["mfu"] = flops / seconds / world / self.peak
        self.sums.zero_()
        self.last_step, self.since, self.waited = step, time.perf_counter(), 0.0
        return metrics

    def _peak_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kib if sys.platform == "darwin" else kib * 1024
