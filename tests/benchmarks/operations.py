"""Operations of a layer in a decoding pass, uncompiled: what PyTorch starts, without views.

    python -m tests.benchmarks.operations

On a fake GPU with the varlen kernel (a norm is one kernel on CUDA), and on this CPU with sdpa.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rcd_core.decoding.chunk import Chunk
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.layers import Layers
from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.config import ModelConfig
from rcd_core.families.loading import new_model
from tests.rcd_core.fake_gpu.device import VIEWS, FakeGpu
from tests.rcd_core.fake_gpu.models import fake_model


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            if func.namespace == "aten" and (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                return parts
        name = func.__name__.split(".")[0]
        if name not in VIEWS:
            self.calls[name] += 1
        return func(*args, **kwargs)


@torch.inference_mode()
def one_pass(model: DiffusionModel, counting: Any, attention: str) -> Counter[str]:
    """A block of 4 of a request with 8 stored positions. counting: gives a Counter while it is entered."""
    forward = Engine(model, None, max_batch=4, max_length=64, attention=attention)._runner.forward
    forward.layers = Layers(model.backbone.model, model.config, compiled=False)
    packed = forward.pack([(0, [Chunk(np.array([5, 6, 7, 8]), 8, 12, 4)])], queries=4)
    with counting as found:
        forward.hidden(packed)
    return found.calls if isinstance(found, Counting) else found


def on_gpu(attention: str = "varlen") -> Counter[str]:
    with FakeGpu() as gpu:
        few, more = (one_pass(fake_model(gpu, layers=n), gpu.counting(), attention) for n in (1, 2))
    return more - few


def on_cpu() -> Counter[str]:
    counts = []
    for layers in (1, 2):
        config = ModelConfig(
            family="sdar", hidden_size=64, num_layers=layers, num_heads=4, num_kv_heads=2, intermediate_size=96
        )
        info = CheckpointInfo(mask_token_id=99, eos_token_ids=(0,), pad_token_id=0, block_length=4)
        model = new_model(config, vocab_size=100, info=info, seed=0).eval()
        counts.append(one_pass(model, Counting(), "sdpa"))
    return counts[1] - counts[0]


def main() -> None:
    for name, calls in (("fake GPU, varlen", on_gpu()), ("CPU, sdpa", on_cpu())):
        print(f"operations of a layer, {name}: {sum(calls.values())} {json.dumps(dict(calls))}", flush=True)


if __name__ == "__main__":
    main()
