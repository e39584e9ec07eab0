"""What goes into the arithmetic of scaling: measured figures, and sizes found by making the thing itself."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass

import torch

from pipelines.signals.files import shard_name
from rcd_core import ReferenceSignals, WarmStart
from rcd_core.calibration.distance import NUM_BINS
from tests.benchmarks.scaling_costs import TARGET, Cache

BENCHMARKS, SCALING = "tests/benchmarks/README.md", "cluster/SCALING.md"


@dataclass(frozen=True)
class Measured:
    """A figure of this project. quote: the words with which it stands in `source`."""

    value: float
    unit: str
    what: str
    source: str
    quote: str


SURE = Measured(2.4, "entries", "kept per masked token, mass 0.99, a sure reference", BENCHMARKS, "24; 197 | 2.4,")
UNSURE = Measured(31.2, "entries", "the same, an uncertain reference", BENCHMARKS, "31.2, 8.7 %, 23.7 %")
STAGE = Measured(0.983, "", "signals stage against the bare forward, V = 32,000", BENCHMARKS, "0.983 (0.978 to 1.031)")
RESIDUAL = Measured(1.005, "", "RCD step over SFT step, SDAR-1.7B's shape", BENCHMARKS, "| 1.05 | **1.005** |")
ENGINE = Measured(865, "tokens/s", "bare engine, 32 clients, blocks of 8", BENCHMARKS, "256 tokens (engine 865 to 943)")
SERVED = Measured(0.86, "", "served over bare, the lower of two runs", BENCHMARKS, "| | 0.87, 0.86 | 0.88, 0.89 |")
PASS = Measured(2.45, "s", "pass over 64 tokens, SDAR-1.7B's shape, two CPU cores", BENCHMARKS, "both, 2.45 s)")
BYTES = Measured(
    140.8, "bytes", "per masked token, k = 32, V = 151,936, random", SCALING, '"bytes_per_masked_token": 140.8'
)
HASH = Measured(1500, "MB/s", "sha256, one core", SCALING, '"sha256_mb_s": {"median": 1500.0')
GROUPS = Measured(
    302,
    "MB/s",
    "reading row groups of signals, bytes on disk, one core",
    SCALING,
    '"read_group_mb_s": {"median": 302.2',
)
WRITE = Measured(
    9.6,
    "Mtokens/s",
    "the driver of prepare writing examples, one core",
    SCALING,
    '"prepare_write_mtok_s": {"median": 9.6',
)
MEASURED = (SURE, UNSURE, STAGE, RESIDUAL, ENGINE, SERVED, PASS, BYTES, HASH, GROUPS, WRITE)


def manifest(cache: Cache) -> str:
    """What grows in the manifest of the signals: four facts of every shard, its hash twice, and the histogram."""
    shards, digest = range(cache.num_shards), "0" * 64
    rows, weight = int(cache.rows_per_shard), int(cache.shard_bytes)
    lists = {
        "shards": [shard_name(s) for s in shards],
        "row_offsets": [s * rows for s in shards],
        "shard_bytes": [weight] * len(shards),
        "shard_sha256": [digest] * len(shards),
        "fingerprint": [digest] * len(shards),
        "entropy_histogram": [cache.volume.masked // NUM_BINS] * NUM_BINS,
    }
    return json.dumps(lists, indent=2)


def wire_bytes(context: int, block_length: int, top_k: int) -> tuple[int, int]:
    """What one block start sends to a reference replica and gets back. Ids are drawn evenly from the vocabulary."""
    ids = tuple(i * 104_729 % TARGET.vocab_size for i in range(context + block_length))
    ask = WarmStart(ids, tuple(range(context, context + block_length)), block_length, top_k)
    shape = (block_length, top_k)
    one = torch.zeros(block_length)
    signals = ReferenceSignals(torch.zeros(shape, dtype=torch.int32), torch.zeros(shape).half(), one, one, 1.0, 1.0)
    return len(pickle.dumps(ask)), len(signals.to_bytes())
