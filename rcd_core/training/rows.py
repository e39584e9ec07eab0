"""Where training rows come from: examples with noise made on the spot, or the reference-signal cache.

Row g of a run is a pure function of the recipe: epoch e = g // N, draw e mod draws, the (g mod N)-th example in that
draw's permutation. Both sources follow it, so a baseline trained on examples sees the target's very tokens and masks.

Shapes: L tokens, N examples (in a source) or masked positions (in a row), K kept entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rcd_core import storage
from rcd_core.errors import UserError
from rcd_core.noise import NoiseSettings, hash_key, mask_example, splitmix64
from rcd_core.signals import ReferenceSignals
from rcd_core.training.objective import IGNORED, TrainingBatch


@dataclass(frozen=True)
class Row:
    """One training row. input_ids, labels, masked (L,); p the probability each labelled token was masked with;
    signals (N masked positions) only from the cache."""

    index: int
    example_id: str
    draw: int
    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    masked: NDArray[np.bool_]
    p: float
    signals: ReferenceSignals | None = None


class RowSource(Protocol):
    def row(self, index: int) -> Row: ...


@dataclass(frozen=True)
class RowPlan:
    """The order of rows: which (example, draw) stands at index g."""

    num_examples: int
    noise: NoiseSettings

    def permutation(self, draw: int) -> NDArray[np.int64]:
        """(N,) order of the examples in one draw, by sorting hashes: no generator, no state."""
        counters = np.arange(self.num_examples, dtype=np.uint64)
        return np.argsort(splitmix64(counters ^ np.uint64(hash_key("order", self.noise.seed, draw))), kind="stable")

    def locate(self, index: int, cache: dict[int, NDArray[np.int64]]) -> tuple[int, int]:
        """(example number, draw) of row `index`; `cache` keeps the permutation in use."""
        epoch, place = divmod(index, self.num_examples)
        draw = epoch % self.noise.draws
        if draw not in cache:
            cache.clear()
            cache[draw] = self.permutation(draw)
        return int(cache[draw][place]), draw


class ExampleSource:
    """Prepared examples (Parquet, in the manifest's order) with noise drawn by hash."""

    def __init__(self, files: Sequence[str], noise: NoiseSettings) -> None:
        table = read_examples(files)
        self.example_ids = table["example_id"]
        self.input_ids, self.labels = FlatLists(table["input_ids"]), FlatLists(table["labels"])
        self.plan = RowPlan(len(self.example_ids), noise)
        self._permutation: dict[int, NDArray[np.int64]] = {}

    def row(self, index: int) -> Row:
        example, draw = self.plan.locate(index, self._permutation)
        labels = self.labels[example]
        example_id = self.example_ids[example].as_py()
        masked, p = mask_example(labels != IGNORED, example_id, draw, self.plan.noise)
        return Row(index, example_id, draw, self.input_ids[example], labels, masked, p)


class SignalSource:
    """The reference-signal cache: shard s holds rows [s * rows_per_shard, (s + 1) * rows_per_shard)."""

    def __init__(
        self,
        directory: str,
        shards: Sequence[str],
        rows_per_shard: int,
        num_rows: int,
        temperatures: tuple[float, float],
    ) -> None:
        self.directory, self.shards = directory, list(shards)
        self.rows_per_shard, self.num_rows, self.temperatures = rows_per_shard, num_rows, temperatures
        self._loaded: dict[int, dict[str, Any]] = {}

    def row(self, index: int) -> Row:
        shard, place = divmod(index % self.num_rows, self.rows_per_shard)
        c = self._shard(shard)
        input_ids, positions = c["input_ids"][place], c["masked_positions"][place]
        masked = np.zeros(len(input_ids), dtype=bool)
        masked[positions] = True
        shape = (len(positions), -1)
        signals = ReferenceSignals(
            torch.from_numpy(c["topk_ids"][place].reshape(shape)),
            torch.from_numpy(c["topk_logprobs"][place].reshape(shape)),
            torch.from_numpy(c["entropy"][place]),
            torch.from_numpy(c["tail_mass"][place]),
            *self.temperatures,
        )
        p = float(c["p_mask"][place])
        return Row(
            index,
            c["example_id"][place].as_py(),
            int(c["draw"][place]),
            input_ids,
            c["labels"][place],
            masked,
            p,
            signals,
        )

    def _shard(self, shard: int) -> dict[str, Any]:
        if shard not in self._loaded:
            import pyarrow.parquet as pq

            path = storage.join(self.directory, self.shards[shard])
            try:
                with storage.open_input(path) as file:
                    table = pq.read_table(file)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"signal shard {path} cannot be read ({error}); run the stage `signals` again"
                ) from error
            columns: dict[str, Any] = {"example_id": table["example_id"]}
            columns |= {name: table[name].to_numpy() for name in ("draw", "p_mask")}
            for name in ("input_ids", "labels", "masked_positions"):
                columns[name] = FlatLists(table[name])
            for name, dtype in (
                ("topk_ids", "int32"),
                ("topk_logprobs", "float16"),
                ("entropy", "float32"),
                ("tail_mass", "float32"),
            ):
                columns[name] = FlatLists(table[name], dtype)
            while len(self._loaded) > 1:  # this one and the previous are enough for reading in order
                self._loaded.pop(next(iter(self._loaded)))
            self._loaded[shard] = columns
        return self._loaded[shard]


class FlatLists:
    """An Arrow list column as one flat array with offsets: rows are views."""

    def __init__(self, column: Any, dtype: str = "int64") -> None:
        array = column.combine_chunks()
        self.offsets = array.offsets.to_numpy()
        self.values = array.values.to_numpy(zero_copy_only=False).astype(dtype)

    def __getitem__(self, index: int) -> NDArray[Any]:
        row: NDArray[Any] = self.values[self.offsets[index] : self.offsets[index + 1]]
        return row


def read_examples(files: Sequence[str]) -> Any:
    """The training columns of all files, in order, as one Arrow table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for path in files:
        try:
            with storage.open_input(path) as file:
                tables.append(pq.read_table(file, columns=["example_id", "input_ids", "labels"]))
        except (OSError, ValueError) as error:
            raise UserError(f"examples {path} cannot be read ({error}); run the stage `prepare` again") from error
    return pa.concat_tables(tables)


def collate(
    rows: Sequence[Row], *, mask_token_id: int, pad_token_id: int, block_length: int
) -> tuple[TrainingBatch, ReferenceSignals | None]:
    """Rows side by side, padded at the end; signals joined in row-major order of the masked positions."""
    width = max(len(r.input_ids) for r in rows)
    shape = (len(rows), width)
    ids, labels = np.full(shape, pad_token_id), np.full(shape, IGNORED)
    masked, samples = np.zeros(shape, dtype=bool), np.full(shape, -1)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n], labels[i, :n], masked[i, :n], samples[i, :n] = row.input_ids, row.labels, row.masked, 0
    batch = TrainingBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        noisy_ids=torch.from_numpy(np.where(masked, mask_token_id, ids)),
        masked=torch.from_numpy(masked),
        p_mask=torch.tensor([r.p for r in rows]),
        block_length=block_length,
        sample_ids=torch.from_numpy(samples),
    )
    cached = [r.signals for r in rows if r.signals is not None]
    return batch, ReferenceSignals.cat(cached) if cached else None
