"""Rates of one core that cluster/SCALING.md extrapolates and no other benchmark has; seconds.

    python -m tests.benchmarks.scaling --measure

Processor time, so that neighbours count little; median and range of the repeats. Signals are drawn at random at SDAR's
vocabulary: nothing in them can be compressed away, which is the worst case for size and for reading.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines import prepare
from pipelines.signals import files as signal_files
from rcd_core.io import storage
from rcd_core.signals import ReferenceSignals
from rcd_core.training.data.rows import Row
from rcd_core.training.data.signal_cache import _Shard
from rcd_core.training.data.signal_format import SignalGroup, encode
from tests.benchmarks.probe import header

VOCAB, TOP_K, LENGTH, ROWS = 151_936, 32, 4096, 32


def measure(repeats: int = 5) -> None:
    """Prints one JSON object: MB/s of hashing and of reading row groups, of bytes on disk, million tokens/s that the
    driver of `prepare` writes, bytes per masked token."""
    print(header(), flush=True)
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as directory:
        masked, content = write_shard(directory, groups=4, rows=ROWS, length=LENGTH, vocab=VOCAB, top_k=TOP_K)
        path = storage.join(directory, signal_files.shard_name(0))
        shard, megabytes = _Shard(path, 4 * ROWS), content["bytes"] / 1e6
        examples, tokens = _examples(), ROWS * LENGTH / 1e6
        ctx: Any = SimpleNamespace(directory=directory)
        found = {
            "bytes_per_masked_token": round(content["bytes"] / masked, 1),
            "sha256_mb_s": _rates(lambda: storage.sha256(path), megabytes, repeats),
            "read_group_mb_s": _rates(lambda: SignalGroup(shard.read(1), (1.0, 1.0)), megabytes / 4, repeats),
            "prepare_write_mtok_s": _rates(lambda: _write_examples(ctx, examples), tokens, repeats),
        }
    print(json.dumps(found))


def write_shard(
    directory: str, groups: int, rows: int, length: int, vocab: int, top_k: int, shard: int = 0
) -> tuple[int, dict[str, Any]]:
    """A shard of random signals with every second token masked -> (masked tokens, what its sidecar would say)."""
    random = np.random.default_rng(0)
    made, masked = [], np.arange(length) % 2 == 0
    for i in range(groups * rows):
        ids = random.integers(0, vocab, length)
        made.append(Row(i, f"{i:016x}", 0, ids, ids, masked, np.full(length, 0.5)))
    count = int(masked.sum()) * rows
    with signal_files.shard_writer(directory, shard, adaptive=True) as writer:
        for g in range(groups):
            logprobs = torch.from_numpy(np.sort(random.standard_normal((count, top_k)) * 2 - 6)[:, ::-1].copy()).half()
            kept = torch.from_numpy(random.integers(0, vocab, (count, top_k), dtype=np.int32))
            entropy, tail = (torch.from_numpy(random.random(count, dtype=np.float32)) for _ in range(2))
            signals = ReferenceSignals(kept, logprobs, entropy, tail, 1.0, 1.0)
            writer.write(encode(made[g * rows : (g + 1) * rows], signals, adaptive=True))
        return count * groups, writer.close()


def _examples() -> pa.Table:
    random = np.random.default_rng(0)
    offsets = pa.array(np.arange(ROWS + 1) * LENGTH, pa.int32())
    ids = pa.ListArray.from_arrays(offsets, pa.array(random.integers(0, VOCAB, ROWS * LENGTH), pa.int32()))
    names, lengths = pa.array([f"{i:016x}" for i in range(ROWS)]), pa.array([0] * ROWS, pa.int32())
    return pa.table([names, ids, ids, lengths], schema=prepare.SCHEMAS["train"])


def _write_examples(ctx: Any, examples: pa.Table) -> None:
    """What the driver does with every file of examples."""
    prepare._write_file(ctx, "train", 0, examples)
    prepare._digest(examples, hashlib.sha256())


def _rates(work: Callable[[], Any], amount: float, repeats: int) -> dict[str, float]:
    """Amount per second of processor time."""
    work()
    rates = []
    for _ in range(repeats):
        begun = time.process_time()
        work()
        rates.append(amount / (time.process_time() - begun))
    return {"median": round(median(rates), 1), "min": round(min(rates), 1), "max": round(max(rates), 1)}
