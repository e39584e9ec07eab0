"""Plans the stage `signals` before anything is computed: which rows each shard holds, and how large it will be.

A shard is a range of rows in training order, a group is a range of rows inside a shard, and a batch is some rows of a
group. All three are pure functions of the recipe and the examples' manifest (a batch: of its rows' lengths), so the
results depend neither on the number of actors nor on interruptions.

Shapes: C chunks of examples, K kept entries, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.recipe.model import Recipe
from pipelines.run.directory import StageContext
from rcd_core.io import storage
from rcd_core.noise import NoiseSettings, seed_of
from rcd_core.process import ProcessSettings
from rcd_core.training.data.examples import Chunks
from rcd_core.training.data.rows import Integers, RowOrder, TrainingRow
from rcd_core.training.data.signal_format import SCHEMA_VERSION
from rcd_core.training.settings import ResidualSettings, SignalRule

MB = 1_000_000
GROUP_BATCHES = 8  # a group holds the tokens of 8 batches: enough rows to sort by length, few enough for memory


@dataclass(frozen=True, kw_only=True)
class SignalJob:
    """What an actor needs to compute any shard. row_offsets: [0, ..., rows], the first row of each shard, counted from
    first_row of the training. own: the model makes its signals as in decoding, from noisier versions of the rows, with
    these residuals (rcd_core/training/own_signals.py); None: it is a reference, which sees the rows' own masks.
    on_policy: with `own`, share of the rows that are masked anew."""

    directory: str
    reference: str
    examples: tuple[str, ...]
    chunks: Chunks
    noise: NoiseSettings
    block_length: int
    rule: SignalRule
    row_offsets: tuple[int, ...]
    batch_tokens: int
    threads: int
    gpus: float = 0
    first_row: int = 0
    own: ResidualSettings | None = None
    on_policy: float = 0.0
    seed: int = 0  # of the noisier versions
    process: ProcessSettings = ProcessSettings()

    @property
    def num_shards(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def num_rows(self) -> int:
        return self.row_offsets[-1]

    @property
    def adaptive(self) -> bool:
        """Whether the number of kept entries differs between positions."""
        return self.rule.keep_mass is not None

    def rows_of(self, shard: int) -> range:
        return range(self.row_offsets[shard], self.row_offsets[shard + 1])

    def describes(self, sidecar: Mapping[str, Any], shard: int) -> bool:
        """Whether a sidecar is one of this program for these rows."""
        rows = self.rows_of(shard)
        expected = {"schema_version": SCHEMA_VERSION, "first_row": rows.start, "rows": len(rows)}
        return all(sidecar.get(name) == value for name, value in expected.items())


def make_job(ctx: StageContext) -> SignalJob:
    """The whole plan: a pure function of the recipe and the manifests of the stages before."""
    recipe, prepare = ctx.recipe, ctx.input("prepare")["summary"]
    chunks = Chunks.from_manifest(prepare["chunks"])
    rows = rows_of(recipe, ctx.stage, sum(chunks.rows))
    own, reference = None, "reference"
    if (number := recipe.round_of(ctx.stage)) is not None:
        reference = f"round-{number - 1}"
        learned = ctx.input(reference)["summary"]["rcd"]
        own = replace(recipe.target.residual, alpha_scale=learned["alpha_scale"])
    elif recipe.signals.on_policy:
        own = ResidualSettings(source="none")
    return SignalJob(
        directory=ctx.directory,
        reference=ctx.checkpoint(reference),
        examples=tuple(storage.join(ctx.input_dir("prepare"), "train", name) for name in prepare["train"]),
        chunks=chunks,
        noise=recipe.noise,
        block_length=recipe.block_length,
        rule=recipe.signals.rule,
        row_offsets=tuple(plan_shards(recipe, prepare, len(rows))),
        batch_tokens=recipe.signals.batch_tokens,
        threads=max(1, int(recipe.resources.cpus_per_worker)),
        gpus=recipe.resources.gpus_per_worker,
        first_row=rows.start,
        own=own,
        on_policy=recipe.signals.on_policy,
        seed=seed_of(recipe.seed, ctx.stage),
        process=recipe.process,
    )


def rows_of(recipe: Recipe, stage: str, num_examples: int) -> range:
    """The rows of the training whose signals a stage makes: as many as the longest training on them reads, but each
    (example, draw) once at most."""
    train = recipe.training("target").train.resolved(num_examples)
    ends = recipe.target.round_ends(train.steps)
    number = recipe.round_of(stage) or 1
    first = ends[number - 2] if number > 1 else 0
    count = (ends[number - 1] - first) * train.batch_size
    if number == 1 and any(residual.source == "signals" for residual in recipe.variants.values()):
        count = train.steps * train.batch_size
    first *= train.batch_size
    return range(first, first + min(count, num_examples * recipe.noise.draws))


def planned_rows(recipe: Recipe, num_examples: int) -> int:
    """Of the reference."""
    return len(rows_of(recipe, "signals", num_examples))


def predicted_bytes(rows: Any, tokens: Any, labelled: Any, *, vocab_size: int, top_k: int) -> Any:
    """Bytes on disk of rows with these numbers of tokens, half of the labelled ones masked. Integers or arrays of them.

    An id packs into the bits of V and a log-probability into 13 bits; position, entropy and tail take 8 bytes, a row's
    own columns 8 (measured: signal_format.parquet_options). Adaptive k keeps less than the top_k counted here.
    """
    id_bits = (vocab_size - 1).bit_length()
    per_masked = 64 + min(top_k, vocab_size) * (13 + id_bits)
    return (64 * rows + 2 * id_bits * tokens + labelled // 2 * per_masked) // 8


def plan_shards(recipe: Recipe, prepare: Mapping[str, Any], rows: int | None = None) -> list[int]:
    """Row offsets [0, ..., rows] of shards of equal predicted size, each about signals.shard_mb at most.

    prepare: the summary of that stage. rows: their number, None: the reference's. Sizes are those of the first rows.
    """
    order = RowOrder(prepare["chunks"]["rows"], recipe.noise)
    rows = planned_rows(recipe, order.num_examples) if rows is None else rows
    ends, sizes = _chunks_in_order(order, rows, recipe.noise, _chunk_bytes(recipe, prepare))
    starts, offsets = np.concatenate([[0], ends]), np.concatenate([[0], np.cumsum(sizes)])
    total = int(_bytes_before(rows, starts, offsets))
    shards = max(1, -(-total // max(1, round(recipe.signals.shard_mb * MB))))
    cuts = [_row_at(total * s // shards, starts, offsets) for s in range(1, shards)]
    return sorted({0, *(min(c, rows - 1) for c in cuts if c > 0), rows})


def _chunk_bytes(recipe: Recipe, prepare: Mapping[str, Any]) -> Integers:
    """(C,) predicted bytes of one draw of each chunk."""
    rows, tokens, labelled = (np.asarray(prepare["chunks"][n], dtype=np.int64) for n in ("rows", "tokens", "labelled"))
    sizes = predicted_bytes(rows, tokens, labelled, vocab_size=prepare["vocab_size"], top_k=recipe.signals.top_k)
    return np.asarray(sizes, dtype=np.int64)


def _chunks_in_order(order: RowOrder, rows: int, noise: NoiseSettings, sizes: Integers) -> tuple[Integers, Integers]:
    """For the chunks that the first `rows` rows visit: the row after each chunk's last, and its predicted bytes."""
    draws = range(min(noise.draws, -(-rows // order.num_examples)))
    ends = np.concatenate([order.chunks(d)[1][1:] + d * order.num_examples for d in draws])
    return ends, np.concatenate([sizes[order.chunks(d)[0]] for d in draws])


def _bytes_before(row: int, starts: Integers, offsets: Integers) -> int:
    """Predicted bytes before a row; all rows of a chunk count the same."""
    i = int(np.searchsorted(starts, row, side="right")) - 1
    if i + 1 == len(starts):
        return int(offsets[-1])
    rows, size = int(starts[i + 1] - starts[i]), int(offsets[i + 1] - offsets[i])
    return int(offsets[i]) + size * (row - int(starts[i])) // rows


def _row_at(offset: int, starts: Integers, offsets: Integers) -> int:
    """The inverse of _bytes_before."""
    i = min(int(np.searchsorted(offsets, offset, side="right")) - 1, len(starts) - 2)
    rows, size = int(starts[i + 1] - starts[i]), max(1, int(offsets[i + 1] - offsets[i]))
    return int(starts[i]) + rows * (offset - int(offsets[i])) // size


def groups(rows: Iterable[TrainingRow], batch_tokens: int) -> Iterator[list[TrainingRow]]:
    """Consecutive rows of up to GROUP_BATCHES * batch_tokens tokens: what an actor holds, and one row group on disk."""
    group: list[TrainingRow] = []
    tokens = 0
    for row in rows:
        if group and tokens + len(row.input_ids) > GROUP_BATCHES * batch_tokens:
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += max(1, len(row.input_ids))
    if group:
        yield group


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices into `lengths`, similar lengths together, so that rows x longest <= batch_tokens (or a single row)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
