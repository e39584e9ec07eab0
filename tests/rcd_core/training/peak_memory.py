"""Peak memory of rank 0 in a training run of its own processes, above what it had before the model was created.

    python -m tests.rcd_core.training.peak_memory --strategy fsdp2 --world 2     # prints MiB, measured and predicted

Linux and CPU only: the peak is the kernel's VmHWM, reset before the model is created.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from rcd_core.families.config import ModelConfig
from rcd_core.noise import NoiseSettings, mask_example
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.plan import Memory, ModelShape, memory, step_shape
from rcd_core.training.settings import ResidualSettings, TrainSettings
from tests.rcd_core.training.helpers import spawn

CONFIG = ModelConfig(
    family="sdar", hidden_size=512, num_layers=6, num_heads=8, num_kv_heads=4, intermediate_size=1536, head_dim=64
)
VOCAB, LENGTH, BLOCK, ROWS = 16384, 512, 32, 2


class Rows:
    """Rows whose tokens are all labelled."""

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
    """Peak bytes of rank 0."""
    # Freed blocks go back to the system at once, so that resident memory is memory in use.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    with tempfile.TemporaryDirectory() as directory:
        spawn(_worker, world, Path(directory, "bytes"), s)
        return int(Path(directory, "bytes").read_text())


def _worker(rank: int, out: Path, s: TrainSettings) -> None:
    import torch

    from rcd_core.families.base import CheckpointInfo
    from rcd_core.families.loading import new_model
    from rcd_core.training.loop import Callbacks, train

    torch.set_num_threads(1)
    info = CheckpointInfo(mask_token_id=VOCAB - 1, eos_token_ids=(0,), pad_token_id=0, block_length=BLOCK)
    peaks: list[int] = []
    # Read at the last step: after training, rank 0 gathers all weights.
    callbacks = Callbacks(lambda line: peaks.append(_status("VmHWM")), lambda step, save: None)

    def run(config: ModelConfig) -> None:
        model = new_model(config, vocab_size=VOCAB, info=info, seed=0)
        train(model, Rows(), s, ResidualSettings(source="none", dropout=0.0), BLOCK, callbacks)

    run(replace(CONFIG, hidden_size=16, num_layers=1, intermediate_size=16, head_dim=4))  # what is imported late
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run(CONFIG)
    if rank == 0:
        out.write_text(str(peaks[-1] - before))


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
    prediction, peak = predicted(s, world), measured(s, world)
    parts = {f.name: round(getattr(prediction, f.name) / 2**20) for f in fields(prediction)}
    print(json.dumps({"measured_mib": peak >> 20, "predicted_mib": round(prediction.peak) >> 20, "parts_mib": parts}))


if __name__ == "__main__":
    main()
