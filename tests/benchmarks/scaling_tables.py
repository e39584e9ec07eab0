"""The tables of cluster/SCALING.md as functions of some assumptions; scaling.py prints them.

Every figure is measured (scaling_figures.MEASURED), an assumption (scaling_costs.Assumptions) or follows from both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import ceil

from pipelines.data.ordering import BYTES_AT_ONCE
from pipelines.recipe.load import load_recipe
from tests.benchmarks import scaling_costs as costs
from tests.benchmarks.scaling_costs import REFERENCE, TARGET, Assumptions, Cache
from tests.benchmarks.scaling_figures import ENGINE, MEASURED, PASS, SERVED, SURE, UNSURE, WRITE, manifest, wire_bytes

RECIPE = "sdar-8b-b64"
NODES = 100
PREPARED_BYTES = 8  # of a token in Ray's object store: its id and its label, int32
PROBLEMS = 500  # of MATH-500, the recipe's test set
MIB = 1 << 20


@dataclass(frozen=True)
class Table:
    name: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join([f"<!-- {self.name} -->", *("| " + " | ".join(line) + " |" for line in lines)])


class Scaling:
    """The tables under some assumptions."""

    def __init__(self, machine: Assumptions) -> None:
        self.machine = machine
        self.recipe = load_recipe(RECIPE)
        self.gpus = NODES * machine.gpus_per_node
        self.batch = self.recipe.training("target").train.batch_size

    @cached_property
    def cache(self) -> Cache:
        return self._cache(self.machine.tokens)

    def _cache(self, tokens: float) -> Cache:
        return costs.plan_cache(self.recipe, tokens, self.machine.example_tokens, TARGET.vocab_size)

    def tables(self) -> Iterator[Table]:
        yield self.limits()
        yield self.measured()
        yield self.assumed()
        yield self.volume()
        yield self.driver()
        yield self.signals()
        yield self.reading()
        yield self.sending()
        yield self.holding()
        yield self.reference()
        yield self.answering()

    # -- what gives way first

    def limits(self) -> Table:
        m, c, b = self.machine, self.cache, self.batch
        workers = [w for w in range(1, b + 1) if b % w == 0]
        step = {w: costs.step_seconds(b, w, m) for w in workers}
        waiting = next(w for w in workers if costs.wait_seconds(c, b, w, m) > 0.05 * step[w])
        most = costs.workers_of(b, self.gpus)
        wait = costs.wait_seconds(c, b, most, m)
        sent = {
            w: 8 * costs.micro_batches(self.recipe, b, w, m) * costs.fsdp_bytes(TARGET, w) / (m.link_gbps * 1e9)
            for w in workers
        }
        bound = next((w for w in workers if w > m.gpus_per_node and sent[w] > step[w]), None)
        at_most = f"{sent[most]:.2f} s to send, {step[most]:.2f} s to compute at {most} workers"
        slots, batch = costs.contexts_kept(m), self.recipe.deploy.max_batch
        targets = slots // batch
        tokens = [
            costs.contexts_tokens(n * batch, slots, m.context / 2, self.recipe.block_length)
            for n in (targets, targets + 1)
        ]
        driver = c.num_shards * costs.SIDECAR_REQUESTS * m.get_ms / 1e3
        rows = [
            (
                "reference replicas forget contexts",
                f"{targets + 1} targets to a replica",
                f"{tokens[1]:,.0f} tokens a start in place of {tokens[0]:,.0f}",
            ),
            (
                "workers wait while a shard is checked",
                f"{waiting} workers",
                f"{wait / (wait + step[most]):.0%} of the time at {most}",
            ),
            (
                "an evaluation has so many pieces",
                f"{self.pieces} actors",
                f"{self.gpus - self.pieces} of {self.gpus} GPUs idle",
            ),
            ("fsdp2 sends more than it computes", f"{bound} workers" if bound else "not reached", at_most),
            (
                "`train.batch_size` rows for as many workers",
                f"{most} workers",
                f"{NODES - ceil(most / m.gpus_per_node)} of {NODES} nodes idle",
            ),
            (
                "requests to one prefix",
                f"{self._first_over_requests()} workers",
                f"{m.get_per_s:,.0f} a second, each step with as many rows as workers",
            ),
            (
                "the driver looks at each shard's sidecar",
                f"{costs.reference_gpu_seconds(c, m) / driver:.0f} actors",
                f"{c.num_shards / driver:.0f} shards/s at most",
            ),
            (
                "prepare reads its data once per range of keys",
                f"{10 * BYTES_AT_ONCE / PREPARED_BYTES:.1e} tokens",
                "ten times over, and with the square from there",
            ),
        ]
        return Table("limits", ("what gives way", "at", "then"), rows)

    def _first_over_requests(self) -> int:
        """Workers, with one row each, that ask for more than a prefix answers."""
        for workers in range(self.batch, 100 * self.batch, self.batch):
            steps = self.cache.volume.rows / workers
            gets = costs.reads(self.cache, workers).gets / steps
            if gets / costs.step_seconds(workers, workers, self.machine) > self.machine.get_per_s:
                return workers
        return 0

    # -- what goes in

    def measured(self) -> Table:
        rows = [(m.what, f"{m.value:g} {m.unit}".strip(), m.source) for m in MEASURED]
        return Table("measured", ("measured", "value", "source"), rows)

    def assumed(self) -> Table:
        values = {f.name: getattr(self.machine, f.name) for f in fields(Assumptions)}
        shown = {name: value if isinstance(value, str) else f"{value:g}" for name, value in values.items()}
        rows = [(f"`--{f.name}`", shown[f.name], f.metadata["help"]) for f in fields(Assumptions)]
        return Table("assumed", ("flag", "assumed", "what"), rows)

    # -- the stages

    def volume(self) -> Table:
        c, v = self.cache, self.cache.volume
        kept = (self.recipe.signals.top_k, SURE.value, UNSURE.value)
        seconds = costs.reference_gpu_seconds(c, self.machine)
        trained = c.steps * costs.step_seconds(self.batch, 1, self.machine)
        rows = [
            ("rows: examples x draws", f"{v.examples:,} x {self.recipe.noise.draws} = {v.rows:,}"),
            ("tokens, masked tokens", f"{v.tokens:.3g}, {v.masked:.3g}"),
            *((f"bytes with {k:g} entries kept", size(costs.cache_bytes(v, k))) for k in kept),
            ("shards; rows of a shard; of a row group", f"{c.num_shards}; {c.rows_per_shard:.0f}; {c.rows_per_group}"),
            ("row group, bytes", size(c.row_bytes * c.rows_per_group)),
            ("reference (the cache), GPU hours", f"{seconds / 3600:.1f}"),
            ("target, 5 epochs, GPU hours", f"{trained / 3600:.0f}"),
        ]
        return Table("volume", ("signals of the whole run", ""), rows)

    def driver(self) -> Table:
        rows = []
        for factor in (1, 10, 100):
            tokens = factor * self.machine.tokens
            c = self._cache(tokens)
            whole = PREPARED_BYTES * tokens
            ranges = ceil(whole / BYTES_AT_ONCE)
            looked = c.num_shards * costs.SIDECAR_REQUESTS * self.machine.get_ms / 1e3
            written = f"{tokens / 1e6 / WRITE.value / 60:.1f} min"
            cells = (f"{tokens:.1e}", size(whole), f"{ranges} x {size(whole)} = {size(ranges * whole)}", written)
            rows.append((*cells, f"{c.num_shards:,}", size(len(manifest(c))), f"{looked / 60:.1f} min"))
        header = ("tokens", "prepare: held by Ray", "read from it", "written by the driver")
        return Table("driver", (*header, "shards", "manifest", "sidecars, one by one"), rows)

    def signals(self) -> Table:
        rows = []
        for nodes in (1, 12, 50, NODES):
            gpus = nodes * self.machine.gpus_per_node
            t = costs.signals_time(self.cache, gpus, self.machine)
            total = max(t.rounds, t.driver)
            cells = (str(nodes), str(gpus), f"{t.ideal:.0f}", f"{t.rounds:.0f}", f"{t.driver:.0f}")
            written = f"{self.cache.num_bytes / total / 1e9:.2f} GB/s"
            rows.append((*cells, f"{t.ideal / total:.0%}", written, size(nodes * 2 * REFERENCE.parameters)))
        header = ("nodes", "GPUs", "work / GPUs, s", "whole shards, s", "driver, s", "used")
        return Table("signals", (*header, "written", "reference fetched"), rows)

    def _workers(self) -> Iterator[tuple[int, int]]:
        """(batch, workers): the recipe's batch as far as it goes, then one row for each worker."""
        yield from ((self.batch, w) for w in (8, 16, 24, 48, 96))
        yield from ((w, w) for w in (192, 384, 768))

    def reading(self) -> Table:
        rows = []
        for batch, workers in self._workers():
            found = costs.reads(self.cache, workers)
            step = costs.step_seconds(batch, workers, self.machine)
            waits = [
                costs.wait_seconds(self.cache, batch, workers, self.machine, piece)
                for piece in (MIB, costs.HASH_BYTES, None)
            ]
            steps = self.cache.volume.rows / batch
            gets, rate = found.gets / steps, (found.hashed + found.groups) / steps
            cells = (str(batch), str(workers), f"{found.groups / 1e12:.1f} TB", f"{found.hashed / 1e12:.1f} TB")
            wanted = (f"{rate / step / 1e9:.2g}", f"{gets / step:,.0f}")
            rows.append((*cells, *wanted, f"{step:.2f}", *(f"{w / (step + w):.0%}" for w in waits)))
        header = ("batch", "workers", "row groups read", "read to check", "GB/s", "requests/s", "step, s")
        return Table("reading", (*header, "in 1 MiB pieces", "waiting", "checked by group"), rows)

    def sending(self) -> Table:
        rows = []
        links = (100.0, 400.0, 3200.0)
        for batch, workers in self._workers():
            if workers <= self.machine.gpus_per_node:
                continue
            step = costs.step_seconds(batch, workers, self.machine)
            micro = costs.micro_batches(self.recipe, batch, workers, self.machine)
            sharded, whole = micro * costs.fsdp_bytes(TARGET, workers), costs.ddp_bytes(TARGET, workers)
            seconds = [f"{8 * sharded / (link * 1e9) / step:.2f}" for link in links]
            small = 8 * costs.ddp_bytes(REFERENCE, workers) / (self.machine.link_gbps * 1e9)
            cells = (str(batch), str(workers), str(micro), size(sharded), size(whole), f"{step:.2f}")
            rows.append((*cells, *seconds, f"{small:.2f}"))
        header = ("batch", "workers", "micro-batches", "fsdp2, bytes a step", "ddp, bytes a step", "step, s")
        named = [f"fsdp2 / step at {link:g} Gb/s" for link in links]
        return Table("sending", (*header, *named, f"1.7B by ddp at {self.machine.link_gbps:g} Gb/s, s"), rows)

    def holding(self) -> Table:
        rows = []
        for name, shape in (("reference 1.7B", REFERENCE), ("target 8B", TARGET)):
            whole = costs.checkpoint_bytes(shape)
            loading = self.machine.gpus_per_node * 4 * shape.parameters
            seconds = f"{whole / (self.machine.disk_mb_s * 1e6):.0f}"
            rows.append((name, size(whole), size(3 * whole), seconds, size(NODES * whole), size(loading)))
        header = (
            "",
            "checkpoint",
            "in storage at most",
            "s to write or fetch on one disk",
            f"{NODES} nodes resume from",
        )
        return Table("holding", (*header, "host memory of a node while it loads"), rows)

    def reference(self) -> Table:
        rows = []
        batch, b = self.recipe.deploy.max_batch, self.recipe.block_length
        long = replace(self.machine, context=4 * self.machine.context)
        for targets in (1, 2, 3, 4, 8, 16, 32):
            cells = [str(targets), str(targets * batch)]
            for machine in (self.machine, long):
                needed, tokens = costs.replicas_needed(targets, batch, costs.contexts_kept(machine), b, machine)
                cells += [str(needed), f"{tokens:,.0f}"]
            enough = costs.replicas_needed(targets, batch, targets * batch, b, self.machine)[0]
            rows.append((*cells, str(enough)))
        header = ["targets", "contexts under way"]
        for machine in (self.machine, long):
            header += [f"references, context {machine.context:,}", "tokens a start"]
        return Table("reference", (*header, f"if all contexts stayed, {self.machine.context:,}"), rows)

    def answering(self) -> Table:
        m, b, batch = self.machine, self.recipe.block_length, self.recipe.evaluate.batch_size
        long = replace(m, context=4 * m.context)
        per_block = costs.target_flops_per_block(b, m.context / 2, m.tokens_per_pass)
        blocks = m.flops_per_s / per_block
        carried = ENGINE.value * SERVED.value / 8
        ask, reply = wire_bytes(m.context // 2, b, 32)
        rows = [
            ("blocks/s of one busy target (8B, a GPU, any batch)", f"{blocks:.0f}"),
            (
                f"the same in tokens/s; block starts per answer of {m.context:,} tokens",
                f"{blocks * b:,.0f}; {m.context // b}",
            ),
            ("blocks/s that one proxy and ingress have carried here, sharing two cores", f"{carried:.0f}"),
            ("targets behind one ingress for which that is shown to suffice", f"{int(carried / blocks)}"),
            (f"bytes to a reference per start, at {m.context // 2:,} tokens; back", f"{size(ask)}; {size(reply)}"),
            (f"bytes to references at {NODES} busy targets", f"{size(NODES * blocks * (ask + reply))}/s"),
            (
                f"a reference's cache per context of {m.context:,}; contexts that {m.gpu_gb:g} GB have room for",
                f"{size(costs.reference_cache_bytes(1, m.context))}; {costs.contexts_kept(m)}",
            ),
            (
                f"the same of {4 * m.context:,}",
                f"{size(costs.reference_cache_bytes(1, long.context))}; {costs.contexts_kept(long)}",
            ),
            ("starts/s of a 1.7B reference on two CPU cores, blocks of 32", f"{1 / PASS.value:.2f}"),
            (f"pieces of an evaluation: 2 arms, 1 threshold, {PROBLEMS} problems, batch {batch}", str(self.pieces)),
        ]
        return Table("answering", ("serving and evaluation", ""), rows)

    @property
    def pieces(self) -> int:
        e = self.recipe.evaluate
        return costs.evaluation_pieces(PROBLEMS, e.samples, e.batch_size, self.gpus, 2 * len(e.thresholds))


def size(num_bytes: float) -> str:
    """Three digits and a decimal unit."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while num_bytes >= 1000 and len(units) > 1:
        num_bytes /= 1000
        units.pop(0)
    return f"{num_bytes:.3g} {units[0]}"
