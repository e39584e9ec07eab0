"""Memory that the passes of a full batch take. A part of the benchmark `engine`, which runs it in processes of its own.

python -m tests.benchmarks.engine_memory BATCH BLOCK_LENGTH VOCABULARY TOP_K     (TOP_K 0: whole distributions)
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import torch

from rcd_core import DecodeSettings
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.memory import engine_memory
from rcd_core.decoding.request import make_sequence
from tests.benchmarks.attention import _peak_bytes, _reset_peak
from tests.benchmarks.models import DEMO, VOCAB, random_model


def transients() -> dict[str, Any]:
    """Transient memory at batch 128, block 32, V = 151,936, measured in separate processes."""
    found: dict[str, Any] = {}
    for name, top_k in (("sparse", 32), ("dense", 0)):
        command = [sys.executable, "-m", "tests.benchmarks.engine_memory", "128", "32", str(VOCAB), str(top_k)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        taken = json.loads(out.splitlines()[-1])
        found[f"transient_{name}_gib"] = taken["bytes"] / 2**30
        found["transient_planned_gib"] = taken["planned"] / 2**30
    found["transient_gib"] = max(found["transient_sparse_gib"], found["transient_dense_gib"])
    print(json.dumps({k: round(v, 3) for k, v in found.items()}), flush=True)
    return found


def transient(batch: int, block_length: int, vocab: int, top_k: int | None) -> dict[str, int]:
    """Bytes that the passes of a full batch take beyond weights, cache and residual state, and the planned bytes. The
    model is small (width 64, one layer), but its tiles over the vocabulary are full size."""
    model = random_model(replace(DEMO, num_layers=1), vocab)
    prompts = [[1 + i % 100] * block_length for i in range(batch)]
    s = DecodeSettings(
        block_length=block_length,
        max_new_tokens=2 * block_length,
        denoising_steps=4,
        policy="low_confidence_static",
        residual=True,
        start="zero",
        residual_top_k=top_k,
        stop_token_ids=(),
    )
    sequences = [make_sequence(model, p, s, infill=False, has_reference=False) for p in prompts]
    length = len(sequences[0].canvas)
    engine = Engine(model, None, max_batch=batch, max_length=length)
    planned = engine_memory(model, batch, length, block_length)
    for q in sequences:
        engine.add(q)
    with torch.inference_mode():
        for tensor in (*engine._runner.forward.cache.keys, *engine._runner.forward.cache.values):
            tensor.fill_(0)  # touch its pages before the peak is measured
        engine._runner.state.reserve(block_length)
        engine._runner.state.delta.fill_(0)
    model.head(torch.zeros(1, model.config.hidden_size))  # and the linear algebra library's buffers
    _reset_peak(model.device)
    before = _peak_bytes(model.device)
    while engine.busy:
        engine.step()
    return {"bytes": _peak_bytes(model.device) - before, "planned": planned.transient}


if __name__ == "__main__":
    batch, block_length, vocab, top_k = (int(word) for word in sys.argv[1:])
    print(json.dumps(transient(batch, block_length, vocab, top_k or None)))
