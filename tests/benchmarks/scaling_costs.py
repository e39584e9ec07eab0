"""Closed forms of what a run costs as it grows: who reads, sends and asks how much. Pure arithmetic, nothing is run.

Sizes of models, rows, shards and FLOPs come from the functions the stages plan by (signal_plan, signal_costs,
training.plan, flops); here is only what follows from how often the code reads, sends or asks. tests/pipelines/
test_scaling.py holds these forms against the real reader, writer, cache and wire format.

All rows are taken to have the same length. Shapes: W training workers, R rows of a row group, S rows of a shard,
B rows of a step, b block length, V vocabulary, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from math import ceil, erf, sqrt
from typing import Any

import numpy as np

from pipelines.recipe.model import Recipe
from pipelines.signals.costs import PASSES, Volume, column_bytes, costs
from pipelines.signals.plan import GROUP_BATCHES, plan_shards, wanted_rows
from rcd_core.evaluation.flops import pass_flops
from rcd_core.training.plan import ModelShape, peak, work

HASH_BYTES = 16 << 20  # storage.sha256 reads a file in such pieces, each of them a GET
CHUNK = 1024  # prepare.ROWS_PER_GROUP
SIDECAR_REQUESTS = 3  # signal_files.valid_sidecar: HEAD and GET of the sidecar, HEAD of the shard
_SDAR: Any = {"family": "sdar", "num_kv_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_embeddings": False}
REFERENCE = ModelShape(hidden_size=2048, num_layers=28, num_heads=16, intermediate_size=6144, **_SDAR)  # SDAR-1.7B
TARGET = ModelShape(hidden_size=4096, num_layers=36, num_heads=32, intermediate_size=12288, **_SDAR)  # SDAR-8B


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What nobody measured here; each is a flag of tests.benchmarks.scaling, whose text is `help`."""

    tokens: float = field(default=300e6, metadata={"help": "training tokens of one epoch"})
    example_tokens: int = field(default=4096, metadata={"help": "tokens of an example"})
    device: str = field(default="H100", metadata={"help": "GPU; its bf16 peak is the maker's"})
    mfu: float = field(default=0.4, metadata={"help": "share of that peak, everywhere"})
    gpu_gb: float = field(default=80.0, metadata={"help": "its memory in 10^9 bytes"})
    gpus_per_node: int = field(default=8, metadata={"help": "GPUs of a node"})
    link_gbps: float = field(default=400.0, metadata={"help": "Gb/s between nodes, each way, per node"})
    get_ms: float = field(default=30.0, metadata={"help": "ms until an object store begins to answer a request"})
    stream_mb_s: float = field(default=80.0, metadata={"help": "MB/s of one connection to it"})
    get_per_s: float = field(default=5500.0, metadata={"help": "GET and HEAD per second of one prefix"})
    disk_mb_s: float = field(default=2000.0, metadata={"help": "MB/s of a node's own disk"})
    context: int = field(default=4096, metadata={"help": "positions of a served request, prompt and answer"})
    tokens_per_pass: float = field(default=4.0, metadata={"help": "tokens that a decoding pass commits"})

    @property
    def flops_per_s(self) -> float:
        return peak(self.device) * self.mfu

    def get_s(self, num_bytes: float) -> float:
        """Seconds of one GET."""
        return self.get_ms / 1e3 + num_bytes / (self.stream_mb_s * 1e6)


# -- the cache of signals


@dataclass(frozen=True)
class Cache:
    """The signals of a run as the stage plans them. num_bytes: predicted, k fixed; rows_per_group (R), rows_per_shard
    (S); steps: of the target at the recipe's batch."""

    volume: Volume
    num_bytes: float
    num_shards: int
    rows_per_group: int
    steps: int

    @property
    def rows_per_shard(self) -> float:
        return self.volume.rows / self.num_shards

    @property
    def shard_bytes(self) -> float:
        return self.num_bytes / self.num_shards

    @property
    def row_bytes(self) -> float:
        return self.num_bytes / self.volume.rows


def plan_cache(recipe: Recipe, tokens: float, example_tokens: int, vocab_size: int) -> Cache:
    """For so many equal examples, all of whose tokens are labelled: an upper bound."""
    examples = ceil(tokens / example_tokens)
    rows = [min(CHUNK, examples - i) for i in range(0, examples, CHUNK)]
    counted = [n * example_tokens for n in rows]
    prepare = {"vocab_size": vocab_size, "chunks": {"rows": rows, "tokens": counted, "labelled": counted}}
    train = recipe.training("target").train.resolved(examples)
    num_rows = wanted_rows(recipe, examples)
    volume = Volume(
        examples=examples,
        rows=num_rows,
        tokens=num_rows * example_tokens,
        masked=num_rows * example_tokens // 2,
        trained_tokens=train.steps * train.batch_size * example_tokens,
        vocab_size=vocab_size,
        exact=False,
    )
    return Cache(
        volume=volume,
        num_bytes=cache_bytes(volume, recipe.signals.top_k),
        num_shards=len(plan_shards(recipe, prepare)) - 1,
        rows_per_group=max(1, GROUP_BATCHES * recipe.signals.batch_tokens // example_tokens),
        steps=train.steps,
    )


def cache_bytes(volume: Volume, kept: float) -> float:
    """Predicted bytes with so many entries kept at a masked position on the mean."""
    none, one = (sum(column_bytes(volume, k).values()) for k in (0, 1))
    return none + kept * (one - none)


def reference_gpu_seconds(cache: Cache, machine: Assumptions) -> float:
    """Of the stage `signals`, as `rcd signals plan` counts."""
    found = costs(cache.volume, PASSES["sdar"], REFERENCE.parameters, TARGET.parameters, machine.flops_per_s, 0.0)
    return found.reference_hours * 3600


@dataclass(frozen=True)
class SignalsTime:
    """Seconds of the stage `signals`. ideal: work over GPUs; rounds: whole shards per GPU; driver: it looks at each
    finished shard's sidecar, one after the other."""

    ideal: float
    rounds: float
    driver: float


def signals_time(cache: Cache, gpus: int, machine: Assumptions) -> SignalsTime:
    seconds = reference_gpu_seconds(cache, machine)
    return SignalsTime(
        ideal=seconds / gpus,
        rounds=ceil(cache.num_shards / gpus) * seconds / cache.num_shards,
        driver=cache.num_shards * SIDECAR_REQUESTS * machine.get_ms / 1e3,
    )


# -- training reads


@dataclass(frozen=True)
class Reads:
    """All workers together, over one reading of the cache. hashed: to check each shard before it is used; groups: row
    groups, whole; gets: GETs and HEADs."""

    hashed: float
    groups: float
    gets: float


def workers_of(batch_size: int, gpus: int) -> int:
    """The most workers that divide the batch, as the loop asks."""
    return next(w for w in range(min(batch_size, gpus), 0, -1) if batch_size % w == 0)


def reads(cache: Cache, workers: int) -> Reads:
    """Worker r takes rows r, r + W, ...: a group has a row for min(W, R) of them, a shard for min(W, S).

    A worker checks a shard when it first takes a row of it: HEAD for its size, HEAD and a GET per HASH_BYTES for its
    hash; it opens it with a HEAD and a GET for the footer. A row group is one GET.
    """
    volume, shards = cache.volume, cache.num_shards
    groups = volume.rows / cache.rows_per_group
    per_shard, per_group = min(workers, cache.rows_per_shard), min(workers, cache.rows_per_group)
    opened = per_shard * shards
    return Reads(
        hashed=per_shard * cache.num_bytes,
        groups=per_group * cache.num_bytes,
        gets=opened * (4 + ceil(cache.shard_bytes / HASH_BYTES)) + per_group * groups,
    )


def step_seconds(batch_size: int, workers: int, machine: Assumptions) -> float:
    """Computing one optimiser step of the target, by the plan of the training."""
    found = work(TARGET, batch_size, machine.example_tokens, 1.0, workers, machine.device, machine.mfu)
    return found.hours * 3600


def wait_seconds(
    cache: Cache, batch_size: int, workers: int, machine: Assumptions, hash_bytes: int | None = HASH_BYTES
) -> float:
    """Mean seconds a step waits for its rows. One step is prepared while the one before is computed; requests follow
    one another, so a shard's check is one GET after the other. hash_bytes: of each; None: no check of whole shards."""
    own = batch_size / workers
    new_shards = min(own, batch_size / cache.rows_per_shard)
    new_groups = min(own, batch_size / cache.rows_per_group)
    check = 4 * machine.get_ms / 1e3
    if hash_bytes is not None:
        check += ceil(cache.shard_bytes / hash_bytes) * machine.get_ms / 1e3
        check += cache.shard_bytes / (machine.stream_mb_s * 1e6)
    read = new_groups * machine.get_s(cache.row_bytes * cache.rows_per_group)
    computed = step_seconds(batch_size, workers, machine)
    if new_shards >= 1:
        return max(0.0, new_shards * check + read - computed)
    return new_shards * max(0.0, check + read - computed) + (1 - new_shards) * max(0.0, read - computed)


# -- training sends


def micro_batches(recipe: Recipe, batch_size: int, workers: int, machine: Assumptions) -> int:
    """Of a worker and step, in packed rows that are as full as they can be."""
    train = recipe.training("target").train
    rows = ceil(batch_size / workers * machine.example_tokens / (train.pack_length or machine.example_tokens))
    return max(1, ceil(rows / (train.micro_batch_size or rows)))


def fsdp_bytes(shape: ModelShape, workers: int) -> float:
    """Bytes that leave a worker, and, in a ring, a node, in one micro-batch: layers gathered in bf16 for the forward
    and again for the backward pass, what is outside them once, gradients summed in fp32."""
    layers = shape.num_layers * shape.layer_parameters
    return (workers - 1) / workers * (2 * (2 * layers + shape.root_parameters) + 4 * shape.parameters)


def ddp_bytes(shape: ModelShape, workers: int) -> float:
    """The same in one optimiser step under ddp: fp32 gradients, summed and handed back in a ring."""
    return 2 * (workers - 1) / workers * 4 * shape.parameters


def checkpoint_bytes(shape: ModelShape) -> int:
    """fp32 weights and AdamW's two moments."""
    return 12 * shape.parameters


# -- serving


def contexts_tokens(requests: int, slots: int, context: float, block_length: int) -> float:
    """Mean tokens a reference replica passes over for one start of a block of the requests that are at home with it.
    `context`: mean tokens before the block.

    Every request begins one block per round, in an order drawn anew. Where fewer than `slots` others came since its
    last one, it has all but that block, else nothing; and the new block in any case.
    """
    kept = 1.0 if requests <= slots else _kept(requests - 1, slots)
    return kept * block_length + (1 - kept) * context + block_length


def _kept(others: int, slots: int) -> float:
    """Chance that fewer than `slots` of the others come between two blocks of a request, whose places in its rounds are
    u and v, even in [0, 1): each comes after u, or before v, or both. Their number as a normal distribution."""
    places = (np.arange(50) + 0.5) / 50
    p = 1 - places[:, None] * (1 - places[None])
    z = (slots - 0.5 - others * p) / np.sqrt(others * p * (1 - p))
    return float(np.mean([0.5 + 0.5 * erf(x / sqrt(2)) for x in z.ravel()]))


def target_flops_per_block(block_length: int, context: float, tokens_per_pass: float) -> float:
    """Passes of the target over one block, the last one's keys and values stored along with the next block's first."""
    p = block_length / tokens_per_pass
    predicted = block_length * (p + 1) / (2 * p)
    one = pass_flops(TARGET, queries=block_length, keys=context, predicted=predicted)
    return p * one + pass_flops(TARGET, queries=block_length, keys=context, predicted=0)


def replicas_needed(targets: int, batch: int, slots: int, block_length: int, machine: Assumptions) -> tuple[int, float]:
    """(reference replicas that keep up with so many busy targets, tokens they pass over per start of a block); all on
    the same device at the same share of its peak, requests spread evenly."""
    context = machine.context / 2  # mean, from the answer's beginning to its end
    own = target_flops_per_block(block_length, context, machine.tokens_per_pass)
    for replicas in count(1):
        tokens = contexts_tokens(ceil(targets * batch / replicas), slots, context, block_length)
        asked = pass_flops(REFERENCE, queries=tokens, keys=context, predicted=block_length)
        if targets * asked <= replicas * own:
            break
    return replicas, tokens


def contexts_kept(machine: Assumptions) -> int:
    """How many a reference replica with a GPU of its own has room for beside its weights in bf16."""
    room = 0.9e9 * machine.gpu_gb - 2 * REFERENCE.parameters
    return int(room / reference_cache_bytes(1, machine.context))


def reference_cache_bytes(slots: int, length: int) -> float:
    """Keys and values in bf16 of so many contexts."""
    return 2 * 2 * REFERENCE.num_layers * REFERENCE.num_kv_heads * REFERENCE.head_dim * slots * length


def evaluation_pieces(problems: int, samples: int, batch_size: int, actors: int, curves: int) -> int:
    """Pieces of work of an evaluation, which is the most actors that have any. curves: arms x thresholds."""
    answers = problems * samples
    return curves * ceil(answers / max(batch_size, ceil(answers / actors)))
