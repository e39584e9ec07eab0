"""Which limit a growing cluster meets first: arithmetic on plans and stated assumptions. Nothing is run.

    python -m tests.benchmarks.scaling                        # prints the table of cluster/README.md
    python -m tests.benchmarks.scaling --link_gbps 100        # every assumption is a flag

The run: recipe sdar-8b-b64 (reference SDAR-1.7B, target SDAR-8B), examples of equal length whose tokens are all
labelled, half of them masked. Sizes and hours come from the functions that the stages plan with.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from math import ceil
from typing import Any

from pipelines.data.ordering import BYTES_AT_ONCE
from pipelines.recipe.load import load_recipe
from pipelines.recipe.model import Recipe
from pipelines.signals.costs import Volume, column_bytes
from pipelines.signals.plan import GROUP_BATCHES, plan_shards, planned_rows
from rcd_core.io import storage
from rcd_core.training.costs import training_cost
from rcd_core.training.plan import ModelShape

PREPARED_BYTES = 8  # per token in Ray's object store: id and label, int32
PROBLEMS = 500  # MATH-500
_SDAR: Any = {"family": "sdar", "num_kv_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_embeddings": False}
REFERENCE = ModelShape(hidden_size=2048, num_layers=28, num_heads=16, intermediate_size=6144, **_SDAR)  # SDAR-1.7B
TARGET = ModelShape(hidden_size=4096, num_layers=36, num_heads=32, intermediate_size=12288, **_SDAR)  # SDAR-8B


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Figures that were not measured here."""

    tokens: float = _flag(300e6, "training tokens of one epoch")
    example_tokens: int = _flag(4096, "tokens of an example")
    nodes: int = _flag(100, "GPU nodes")
    gpus_per_node: int = _flag(8, "GPUs of a node")
    device: str = _flag("H100", "GPU; its bf16 peak is the maker's")
    mfu: float = _flag(0.4, "share of that peak that is reached")
    gpu_gb: float = _flag(80.0, "GPU memory in 10^9 bytes")
    link_gbps: float = _flag(400.0, "Gb/s between nodes, each way, per node")
    get_ms: float = _flag(30.0, "ms until an object store begins to answer a request")
    stream_mb_s: float = _flag(80.0, "MB/s of one connection to it")
    get_per_s: float = _flag(5500.0, "GET and HEAD requests per second of one prefix")
    context: int = _flag(4096, "positions of a served request, prompt and answer")


class Scaling:
    """The limits under some assumptions."""

    def __init__(self, machine: Assumptions) -> None:
        self.machine = machine
        self.recipe: Recipe = load_recipe("sdar-8b-b64")
        self.train = self.recipe.training("target").train
        self.gpus = machine.nodes * machine.gpus_per_node
        tokens, chunk = machine.example_tokens, 1024  # prepare.ROWS_PER_GROUP
        examples = ceil(machine.tokens / tokens)
        rows = [min(chunk, examples - i) for i in range(0, examples, chunk)]
        counted = [n * tokens for n in rows]
        chunks = {"rows": rows, "tokens": counted, "labelled": counted}
        self.shards = len(plan_shards(self.recipe, {"vocab_size": TARGET.vocab_size, "chunks": chunks})) - 1
        self.rows = planned_rows(self.recipe, examples)
        trained = self.train.resolved(examples).steps * self.train.batch_size * tokens
        cached = self.rows * tokens
        self.volume = Volume(examples, self.rows, cached, cached // 2, trained, TARGET.vocab_size, False)
        self.shard_bytes = sum(column_bytes(self.volume, self.recipe.signals.top_k).values()) / self.shards
        self.rows_per_shard = self.rows / self.shards
        self.rows_per_group = max(1, GROUP_BATCHES * self.recipe.signals.batch_tokens // tokens)

    def step_s(self, batch: int, workers: int) -> float:
        """Seconds to compute one optimiser step of the target."""
        m = self.machine
        return 3600 * training_cost(TARGET, batch, m.example_tokens, 1.0, workers, m.device, m.mfu).hours

    def wait_s(self, workers: int) -> float:
        """Mean seconds a step waits for its rows. A worker prepares one step ahead; before the first row of a shard it
        hashes all of the shard, one GET after the other."""
        m, batch = self.machine, self.train.batch_size
        new_shards = min(batch / workers, batch / self.rows_per_shard)
        check = (4 + ceil(self.shard_bytes / storage._CHUNK)) * m.get_ms / 1e3 + self.shard_bytes / (
            m.stream_mb_s * 1e6
        )
        group_s = m.get_ms / 1e3 + self.shard_bytes / self.rows_per_shard * self.rows_per_group / (m.stream_mb_s * 1e6)
        read = min(batch / workers, batch / self.rows_per_group) * group_s
        computed = self.step_s(batch, workers)
        if new_shards >= 1:
            return max(0.0, new_shards * check + read - computed)
        return new_shards * max(0.0, check + read - computed) + (1 - new_shards) * max(0.0, read - computed)

    def send_s(self, workers: int) -> float:
        """Seconds in which fsdp2's traffic of one step leaves a node: in each micro-batch layers are gathered in bf16
        twice, the rest once, and gradients are summed in fp32, in a ring over all workers."""
        rows = ceil(
            self.train.batch_size
            / workers
            * self.machine.example_tokens
            / (self.train.pack_length or self.volume.tokens)
        )
        micro_batches = max(1, ceil(rows / (self.train.micro_batch_size or rows)))
        layers = TARGET.num_layers * TARGET.layer_parameters
        sent = 2 * (2 * layers + TARGET.root_parameters) + 4 * TARGET.parameters
        return 8 * micro_batches * sent * (workers - 1) / workers / (self.machine.link_gbps * 1e9)

    def requests_per_s(self, workers: int) -> float:
        """GET and HEAD of all workers, one row each a step, so that nobody waits."""
        opened = min(workers, self.rows_per_shard) * self.shards * (4 + ceil(self.shard_bytes / storage._CHUNK))
        groups = min(workers, self.rows_per_group) * self.rows / self.rows_per_group
        return (opened + groups) / (self.rows / workers) / self.step_s(workers, workers)

    def contexts(self) -> int:
        """Contexts whose keys and values fit next to a reference's weights, in bf16."""
        room = 0.9e9 * self.machine.gpu_gb - 2 * REFERENCE.parameters
        position = 4 * REFERENCE.num_layers * REFERENCE.num_kv_heads * REFERENCE.head_dim
        return int(room / (position * self.machine.context))

    def limits(self) -> list[tuple[str, str, str]]:
        """(limit, where it begins, what happens then), by how few machines it takes."""
        m, batch = self.machine, self.train.batch_size
        divisors = [w for w in range(1, batch + 1) if batch % w == 0]
        most = max(w for w in divisors if w <= self.gpus)
        waiting = next((w for w in divisors if self.wait_s(w) > 0.05 * self.step_s(batch, w)), None)
        between = [w for w in divisors if w > m.gpus_per_node]
        sending = next((w for w in between if self.send_s(w) > self.step_s(batch, w)), None)
        evaluate = self.recipe.evaluate
        answers = 2 * len(evaluate.thresholds) * PROBLEMS * evaluate.samples
        prefix = next(w for w in range(batch, 1000 * batch, batch) if self.requests_per_s(w) > m.get_per_s)
        wait = self.wait_s(most) / (self.wait_s(most) + self.step_s(batch, most))
        return [
            (
                "contexts in a reference replica's memory",
                f"{self.contexts() // self.recipe.deploy.max_batch + 1} targets per reference replica",
                "blocks start with a pass over the whole context instead of one block",
            ),
            ("hashing a shard before its first row", _at(waiting), f"workers wait {wait:.0%} of the time at {most}"),
            (
                "answers of an evaluation",
                f"{answers // evaluate.batch_size + 1} actors",
                f"batches of {answers // self.gpus} instead of {evaluate.batch_size} on {self.gpus} GPUs",
            ),
            (
                "fsdp2 traffic between nodes",
                _at(sending),
                f"{self.send_s(most):.2f} s to send, {self.step_s(batch, most):.2f} s to compute at {most}",
            ),
            (
                "rows of a step (`train.batch_size`)",
                f"{most} workers",
                f"{m.nodes - ceil(most / m.gpus_per_node)} of {m.nodes} nodes idle",
            ),
            (
                "requests to one prefix of an object store",
                f"{prefix} workers",
                f"more than {m.get_per_s:,.0f} a second",
            ),
            (
                "prepare reading its data once per range of keys",
                f"{10 * BYTES_AT_ONCE / PREPARED_BYTES:.1e} tokens",
                "reads it ten times; grows with the square",
            ),
        ]


def _at(workers: int | None) -> str:
    return f"{workers} workers" if workers else "not reached"


def table(machine: Assumptions) -> str:
    """The limits as a Markdown table."""
    rows = [("limit", "begins at", "what happens"), ("---",) * 3, *Scaling(machine).limits()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in fields(Assumptions):
        parser.add_argument(
            f"--{flag.name}",
            type=type(flag.default),
            default=flag.default,
            help=f"{flag.metadata['help']} (%(default)s)",
        )
    print(table(Assumptions(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
