"""The rows of a Ray data set in one fixed order, whatever the layout of its blocks and the number of workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

BYTES_AT_ONCE = 1 << 30  # of rows in the driver's memory


def in_order(data: ray.data.Dataset, schema: pa.Schema, key: str, size: int) -> Iterator[pa.Table]:
    """Rows by their text `key`, in tables of exactly `size` rows, the last one excepted; rows without a key are left.

    data: materialised. It is read a range of keys at a time, so that one range fits the driver's memory.
    Dataset.sort would do for the largest data, but its shuffle takes seconds where the rows are few.
    """
    return _rebatch(_ranges(data, schema, key), size)


def collect(data: ray.data.Dataset, function: Any, schema: pa.Schema) -> pa.Table:
    """What `function` keeps of each block, brought to the driver in no particular order."""
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
    chosen = pc.greater_equal(rows[key], low)  # null where there is no key, which filter() takes for false
    return rows.filter(chosen if high is None else pc.and_(chosen, pc.less(rows[key], high)))


def _rebatch(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `size`, the last one excepted."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        while sum(map(len, held)) >= size:
            rows = pa.concat_tables(held)
            yield rows.slice(0, size)
            held = [rows.slice(size)]
    if sum(map(len, held)):
        yield pa.concat_tables(held)
