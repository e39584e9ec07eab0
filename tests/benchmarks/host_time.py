"""Host time of an engine's step: the layers and the head return at once, so what is left is Python and small arrays.

    python -m tests.benchmarks.host_time [--requests 128] [--block_length 4] [--steps 150] [--repeats 3]

A step at whose end some blocks are done and new ones open, greedy and sampled, with and without residuals.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from rcd_core import DecodeSettings
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.model_runner import Forward
from rcd_core.decoding.request import make_sequence
from rcd_core.decoding.sampler import Sampler
from rcd_core.families.config import ModelConfig
from tests.benchmarks.models import random_model
from tests.benchmarks.probe import header

SIZES = ModelConfig(
    family="sdar", hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=16, max_positions=8192
)
VOCAB, WARM_UP = 64, 40
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, residuals": {"residual": True, "start": "zero"},
    "sampled": {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--block_length", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(header(), flush=True)
    found = {}
    for kind, changes in KINDS.items():
        medians = [statistics.median(step_times(options, changes)) for _ in range(options.repeats)]
        found[kind] = statistics.median(medians)
        spread = f"{min(medians):.2f} to {max(medians):.2f}"
        print(f"{kind}: {found[kind]:.2f} ms a step of {options.requests} requests ({spread})", flush=True)
    print(json.dumps(found))


def step_times(options: argparse.Namespace, changes: dict[str, Any]) -> list[float]:
    """Milliseconds of each step."""
    model, generator = random_model(SIZES, VOCAB), np.random.default_rng(0)
    most = (options.steps + WARM_UP) * options.block_length
    engine = Engine(model, None, max_batch=options.requests, max_length=most + 64)
    for seed in range(options.requests):
        settings = DecodeSettings(
            block_length=options.block_length, max_new_tokens=most, confidence_threshold=0.9, stop_token_ids=(),
            seed=seed, **changes,
        )  # fmt: skip
        prompt = generator.integers(1, VOCAB - 4, 16 + seed % 32).tolist()
        engine.add(make_sequence(model, prompt, settings, infill=False, has_reference=False))
    for _ in range(WARM_UP // 2):
        engine.step()
    times = []
    with no_device_work():
        for _ in range(WARM_UP // 2 + options.steps):
            begun = time.perf_counter()
            engine.step()
            times.append(1e3 * (time.perf_counter() - begun))
    return times[WARM_UP // 2 :]


@contextmanager
def no_device_work() -> Iterator[None]:
    """Passes return zeros, and a third of the predictions are confident."""
    states: dict[int, torch.Tensor] = {}
    made_up = torch.rand(4, 1 << 16, generator=torch.Generator().manual_seed(0)).clamp(max=0.89)
    made_up[0], made_up[1, ::3] = 5, 0.95

    def hidden(_: Forward, packed: Any, at: Any = None) -> torch.Tensor:
        tokens = packed.shape.tokens if at is None else len(at)
        return states.setdefault(tokens, torch.zeros(tokens, SIZES.hidden_size))

    def tiles(_: Sampler, *inputs: Any) -> None:
        results = inputs[4]
        results.copy_(made_up[:, : results.shape[1]])

    with mock.patch.object(Forward, "hidden", hidden), mock.patch.object(Sampler, "_tiles", tiles):
        yield


if __name__ == "__main__":
    main()
