"""The content of a signal shard: training rows with their signals as Arrow tables, one table per row group.

One Arrow row is one training row. Its lists run over its tokens (input_ids, labels, p_mask), its masked positions
(masked_positions, entropy, tail_mass) or the kept entries of these positions (topk_ids, topk_logprobs). p_mask has one
number if it is the same for all tokens. num_kept, entries per position, exists only where k is adaptive.

Shapes: R rows, N masked positions of all rows, K kept entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rcd_core.noise import count_set
from rcd_core.signal_arrow import pad_entries
from rcd_core.signals import ReferenceSignals
from rcd_core.training.data.examples import FlatLists
from rcd_core.training.data.rows import TrainingRow

SCHEMA_VERSION = 3

_PLAIN = ("example_id", "draw", "reason")
_INTEGERS = ("input_ids", "labels", "masked_positions", "topk_ids")
_FLOATS = ("p_mask", "topk_logprobs", "entropy", "tail_mass")


def schema(adaptive: bool) -> Any:
    """The Arrow schema. adaptive: with num_kept."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    return pa.schema(
        {
            "example_id": pa.string(),
            "draw": pa.int32(),
            "p_mask": pa.list_(pa.float32()),
            "reason": pa.string(),  # why the row was rejected; then its lists are empty
            "input_ids": ids,
            "labels": ids,
            "masked_positions": ids,
            **({"num_kept": pa.list_(pa.int16())} if adaptive else {}),
            "topk_ids": ids,
            "topk_logprobs": pa.list_(pa.float16()),
            "entropy": pa.list_(pa.float32()),
            "tail_mass": pa.list_(pa.float32()),
        }
    )


def parquet_options(adaptive: bool) -> dict[str, Any]:
    """Keywords of pyarrow.parquet.ParquetWriter.

    Ids repeat, so a dictionary packs them; floats compress better with their bytes split by significance. On the demo's
    signals (271 ids, k = 8) a kept entry takes 2.1 bytes (2.4 with the writer's defaults) and the rest of a masked
    token 10.7 (14.5).
    """
    lists = [*_INTEGERS, "num_kept"] if adaptive else [*_INTEGERS]
    return {
        "compression": "zstd",
        "use_dictionary": [*(f"{name}.list.element" for name in lists), "reason"],
        "column_encoding": {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in _FLOATS},
    }


def encode(rows: Sequence[TrainingRow], signals: ReferenceSignals, adaptive: bool) -> Any:
    """R rows and the signals (N, K) of all their masked positions -> a table of `schema(adaptive)`."""
    import pyarrow as pa

    lengths = np.array([len(r.input_ids) for r in rows], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.flatnonzero(np.concatenate([r.masked for r in rows]))  # of the rows end to end
    counts = np.diff(np.searchsorted(positions, starts))
    ids, logprobs = signals.topk_ids.numpy(), signals.topk_logprobs.numpy()
    if adaptive:
        kept = np.isfinite(logprobs)
        flat_ids, flat_logprobs, num_kept = ids[kept], logprobs[kept], kept.sum(1, dtype=np.int16)
        entries = count_set(kept.ravel(), np.concatenate([[0], np.cumsum(counts)]) * kept.shape[1])
    else:
        flat_ids, flat_logprobs, entries, num_kept = ids.ravel(), logprobs.ravel(), counts * ids.shape[1], None
    p = [r.p[:1] if (r.p == r.p[:1]).all() else r.p for r in rows]
    fields = schema(adaptive)

    def lists(name: str, values: NDArray[Any], sizes: Any) -> Any:
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(values, fields.field(name).type.value_type))

    columns = {
        "example_id": pa.array([r.example_id for r in rows], pa.string()),
        "draw": pa.array([r.draw for r in rows], pa.int32()),
        "p_mask": lists("p_mask", np.concatenate(p), [len(part) for part in p]),
        "reason": pa.array([r.reason for r in rows], pa.string()),
        "input_ids": lists("input_ids", np.concatenate([r.input_ids for r in rows]), lengths),
        "labels": lists("labels", np.concatenate([r.labels for r in rows]), lengths),
        "masked_positions": lists("masked_positions", positions - np.repeat(starts[:-1], counts), counts),
        "topk_ids": lists("topk_ids", flat_ids, entries),
        "topk_logprobs": lists("topk_logprobs", flat_logprobs, entries),
        "entropy": lists("entropy", signals.entropy.numpy(), counts),
        "tail_mass": lists("tail_mass", signals.tail_mass.numpy(), counts),
    }
    if num_kept is not None:
        columns["num_kept"] = lists("num_kept", num_kept, counts)
    return pa.table([columns[name] for name in fields.names], schema=fields)


class SignalGroup:
    """The rows of one row group, decoded; the inverse of `encode`."""

    def __init__(self, table: Any, temperatures: tuple[float, float]) -> None:
        self.temperatures = temperatures
        self._plain = {name: table[name].combine_chunks() for name in _PLAIN}
        names = [*_INTEGERS, *_FLOATS, *(["num_kept"] if "num_kept" in table.column_names else [])]
        self._lists = {name: FlatLists(table[name]) for name in names}

    def row(self, place: int, index: int) -> TrainingRow:
        """Row `place` of the group, to be row `index` of the run."""
        example_id, draw, reason = (self._plain[n][place].as_py() for n in _PLAIN)
        signals = self._signals(place)
        if reason:
            return TrainingRow.rejected(index, example_id, draw, reason, signals)
        input_ids, labels, positions = (self._lists[n][place] for n in ("input_ids", "labels", "masked_positions"))
        masked = np.zeros(len(input_ids), dtype=bool)
        masked[positions] = True
        p = np.broadcast_to(self._lists["p_mask"][place].astype(np.float64), len(input_ids))
        ids = (input_ids.astype(np.int64), labels.astype(np.int64))
        return TrainingRow(index, example_id, draw, *ids, masked, p, signals, reason)

    def _signals(self, place: int) -> ReferenceSignals:
        # Copied because a prefetched batch may outlive the group.
        names = ("topk_ids", "topk_logprobs", "entropy", "tail_mass")
        ids, logprobs, entropy, tail = (torch.from_numpy(self._lists[n][place].copy()) for n in names)
        if "num_kept" in self._lists:
            num_kept = torch.from_numpy(self._lists["num_kept"][place].astype(np.int64))
            ids, logprobs = pad_entries(ids, logprobs, num_kept, int(num_kept.max()) if len(num_kept) else 1)
        else:
            shape = (len(entropy), len(ids) // max(1, len(entropy)))
            ids, logprobs = ids.reshape(shape), logprobs.reshape(shape)
        return ReferenceSignals(ids, logprobs, entropy, tail, *self.temperatures)
