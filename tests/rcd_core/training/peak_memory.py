"""One training in processes of its own, and the most memory that rank 0 had beyond what it began with.

    python -m tests.rcd_core.training.peak_memory --strategy fsdp2 --world 2     # prints bytes, measured and predicted

Linux and CPU: the peak is the kernel's (VmHWM), reset before the model is made.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from rcd_core.families.config import ModelConfig
from rcd_core.noise import NoiseSettings, mask_example
from rcd_core.residual import ResidualSettings
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.plan import Memory, ModelShape, memory, step_shape
from rcd_core.training.settings import TrainSettings

CONFIG = ModelConfig(
    family="sdar", hidden_size=512, num_layers=6, num_heads=8, num_kv_heads=4, intermediate_size=1536, head_dim=64
)
VOCAB, LENGTH, BLOCK, ROWS = 16384, 512, 32, 2


class Rows:
    """Rows of which everything is labelled."""

    def row(self, index: int) -> TrainingRow:
        ids = np.random.default_rng(index).integers(0, VOCAB - 1, LENGTH)
        masked, p = mask_example(np.ones(LENGTH, dtype=bool), str(index), 0, NoiseSettings())
        return TrainingRow(index, str(index), 0, ids, ids, masked, p)


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(steps=3, batch_size=ROWS, log_every=3, **changes)


def predicted(s: TrainSettings, world: int) -> Memory:
    shape = ModelShape.of(CONFIG, VOCAB)
    return memory(shape, s, step_shape(shape, s, LENGTH, world, labelled_share=1.0, signal_k=0), world)


def measured(s: TrainSettings, world: int) -> int:
    """Bytes of rank 0 at its peak."""
    import torch.multiprocessing as mp

    # Every block of memory of its own goes back when it is freed: what is measured is what is in use.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(_worker, (world, port, directory, s), nprocs=world)
        return int(Path(directory, "bytes").read_text())


def _worker(rank: int, world: int, port: int, directory: str, s: TrainSettings) -> None:
    import torch
    import torch.distributed as dist

    from rcd_core.families.base import CheckpointInfo
    from rcd_core.families.loading import new_model
    from rcd_core.training.loop import Callbacks, train

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if world > 1 or s.strategy != "ddp":
        dist.init_process_group("gloo", rank=rank, world_size=world)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    info = CheckpointInfo(mask_token_id=VOCAB - 1, eos_token_ids=(0,), pad_token_id=0, block_length=BLOCK)
    model = new_model(CONFIG, vocab_size=VOCAB, info=info, seed=0)
    marks: list[int] = []
    # The result gathers all weights on rank 0, which is after training: the peak is read at the last step.
    callbacks = Callbacks(lambda line: marks.append(_status("VmHWM")), lambda step, save: None)
    train(model, Rows(), s, ResidualSettings(source="none", dropout=0.0), BLOCK, callbacks)
    if rank == 0:
        Path(directory, "bytes").write_text(str(marks[-1] - before))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--micro_batch_size", type=int)
    parser.add_argument("--dtype", default="float32")
    options = vars(parser.parse_args())
    world = options.pop("world")
    s = settings(**options)
    expected, found = predicted(s, world), measured(s, world)
    parts = {f.name: round(getattr(expected, f.name) / 2**20) for f in fields(expected)}
    print(json.dumps({"measured_mib": found >> 20, "predicted_mib": round(expected.peak) >> 20, "parts_mib": parts}))


if __name__ == "__main__":
    main()
