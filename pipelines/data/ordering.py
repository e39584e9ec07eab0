"""The rows of a Ray Data dataset in a fixed order, independent of its blocks and of the number of workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

BYTES_AT_ONCE = 1 << 30  # rows in the driver's memory


def in_order(data: ray.data.Dataset, schema: pa.Schema, key: str, size: int) -> Iterator[pa.Table]:
    """Yield rows sorted by the string column `key`, in tables of `size` rows (the last may be shorter).

    data: materialised; rows with a null key are dropped. Reads one range of keys at a time, which fits the driver's
    memory. Dataset.sort would work too, but its shuffle takes seconds even for few rows.
    """
    return _rebatch(_ranges(data, schema, key), size)


def collect(data: ray.data.Dataset, function: Any, schema: pa.Schema) -> pa.Table:
    """The rows that `function` returns for each block, as one table in no particular order."""
    batches: Any = data.map_batches(function, batch_size=None, batch_format="pyarrow").iter_batches(
        batch_size=None, batch_format="pyarrow"
    )
    return pa.concat_tables([schema.empty_table(), *(b.select(schema.names).cast(schema) for b in batches if len(b))])


def _ranges(data: ray.data.Dataset, schema: pa.Schema, key: str) -> Iterator[pa.Table]:
    keys = sorted(collect(data, partial(_keys, key=key), pa.schema([schema.field(key)]))[key].to_pylist())
    size = -(-len(keys) // max(1, -(-data.size_bytes() // BYTES_AT_ONCE)))
    for low, high in pairwise([*keys[::size], None] if keys else []):
        table = collect(data, partial(_between, key=key, low=low, high=high), schema)
        yield table.sort_by(key).combine_chunks()


def _keys(rows: pa.Table, key: str) -> pa.Table:
    return rows.filter(pc.is_valid(rows[key])).select([key])


def _between(rows: pa.Table, key: str, low: str, high: str | None) -> pa.Table:
    chosen = pc.greater_equal(rows[key], low)  # null for a null key, which filter() treats as false
    return rows.filter(chosen if high is None else pc.and_(chosen, pc.less(rows[key], high)))


def _rebatch(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size` rows; the last may be shorter."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table)
        while sum(map(len, pending)) >= size:
            rows = pa.concat_tables(pending)
            yield rows.slice(0, size)
            pending = [rows.slice(size)]
    if sum(map(len, pending)):
        yield pa.concat_tables(pending)
