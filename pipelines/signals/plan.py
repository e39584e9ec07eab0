"""The plan of the stage `signals`, made before anything is computed: which rows each shard holds, and what it weighs.

A shard is a range of rows in training order, a group a range of rows inside a shard, a batch some rows of a group. All
three are pure functions of the recipe and of the examples' manifest (a batch: of its rows' lengths), so the numbers
depend neither on the number of actors nor on what was interrupted when.

Shapes: C chunks of examples, K kept entries, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.recipe.model import Recipe
from rcd_core.noise import NoiseSettings
from rcd_core.training.data.rows import Integers, RowOrder, TrainingRow

MB = 1_000_000
GROUP_BATCHES = 8  # batches' worth of tokens in a group: enough rows to sort by length, little enough to hold


def wanted_rows(recipe: Recipe, num_examples: int) -> int:
    """As many rows as the targets train on, but never the same (example, draw) twice."""
    stages = ("target", *(f"target-{name}" for name in recipe.variants))
    steps = [recipe.training(s).train.resolved(num_examples) for s in stages]
    return min(max(t.steps * t.batch_size for t in steps), num_examples * recipe.noise.draws)


def predicted_bytes(rows: Any, tokens: Any, labelled: Any, *, vocab_size: int, top_k: int) -> Any:
    """Bytes on disk of so many rows with so many tokens, of which half of the labelled ones are masked; whole numbers,
    or arrays of them.

    An id packs into the bits of V, a log-probability into 13 bits, position, entropy and tail into 8 bytes, a row's
    own columns into 8 (measured: signal_format.parquet_options). Adaptive k keeps less than the top_k counted here.
    """
    id_bits = (vocab_size - 1).bit_length()
    per_masked = 64 + min(top_k, vocab_size) * (13 + id_bits)
    return (64 * rows + 2 * id_bits * tokens + labelled // 2 * per_masked) // 8


def chunk_bytes(recipe: Recipe, prepare: Mapping[str, Any]) -> Integers:
    """(C,) predicted bytes of one draw of each chunk. prepare: the summary of that stage."""
    rows, tokens, labelled = (np.asarray(prepare["chunks"][n], dtype=np.int64) for n in ("rows", "tokens", "labelled"))
    found = predicted_bytes(rows, tokens, labelled, vocab_size=prepare["vocab_size"], top_k=recipe.signals.top_k)
    return np.asarray(found, dtype=np.int64)


def plan_shards(recipe: Recipe, prepare: Mapping[str, Any]) -> list[int]:
    """Row offsets [0, ..., rows] of the shards: equal in predicted bytes, each at most about signals.shard_mb."""
    order = RowOrder(prepare["chunks"]["rows"], recipe.noise)
    rows = wanted_rows(recipe, order.num_examples)
    ends, sizes = _chunks_in_order(order, rows, recipe.noise, chunk_bytes(recipe, prepare))
    heights = np.concatenate([[0], np.cumsum(sizes)])
    starts = np.concatenate([[0], ends])
    total = int(_at(rows, starts, heights))
    shards = max(1, -(-total // max(1, round(recipe.signals.shard_mb * MB))))
    cuts = [_row_at(total * s // shards, starts, heights) for s in range(1, shards)]
    return sorted({0, *(min(c, rows - 1) for c in cuts if c > 0), rows})


def _chunks_in_order(order: RowOrder, rows: int, noise: NoiseSettings, weights: Integers) -> tuple[Integers, Integers]:
    """For the chunks that the first `rows` rows visit: the row after each one's last, and its predicted bytes."""
    draws = range(min(noise.draws, -(-rows // order.num_examples)))
    ends = np.concatenate([order.chunks(d)[1][1:] + d * order.num_examples for d in draws])
    return ends, np.concatenate([weights[order.chunks(d)[0]] for d in draws])


def _at(row: int, starts: Integers, heights: Integers) -> int:
    """Bytes before a row: inside a chunk all rows weigh the same."""
    i = int(np.searchsorted(starts, row, side="right")) - 1
    if i + 1 == len(starts):
        return int(heights[-1])
    span, rise = int(starts[i + 1] - starts[i]), int(heights[i + 1] - heights[i])
    return int(heights[i]) + rise * (row - int(starts[i])) // span


def _row_at(height: int, starts: Integers, heights: Integers) -> int:
    """The inverse of _at."""
    i = min(int(np.searchsorted(heights, height, side="right")) - 1, len(starts) - 2)
    span, rise = int(starts[i + 1] - starts[i]), max(1, int(heights[i + 1] - heights[i]))
    return int(starts[i]) + span * (height - int(heights[i])) // rise


def groups(rows: Iterable[TrainingRow], batch_tokens: int) -> Iterator[list[TrainingRow]]:
    """Consecutive rows of up to GROUP_BATCHES * batch_tokens tokens: what an actor holds, and one row group on disk."""
    held: list[TrainingRow] = []
    tokens = 0
    for row in rows:
        if held and tokens + len(row.input_ids) > GROUP_BATCHES * batch_tokens:
            yield held
            held, tokens = [], 0
        held.append(row)
        tokens += max(1, len(row.input_ids))
    if held:
        yield held


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices into `lengths`, similar lengths together, so that rows x longest <= batch_tokens (or a single row)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
