"""Examples in Parquet, as the stage `prepare` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rcd_core.noise import NoiseSettings

BLOCK = 4
IDS = pa.list_(pa.int32())
NOISE = NoiseSettings(draws=3)


def example(i: int) -> dict[str, Any]:
    ids = np.random.default_rng(i).integers(0, 500, BLOCK * (2 + i % 4)).tolist()
    return {"example_id": f"{i:04d}", "input_ids": ids, "labels": [-100] * BLOCK + ids[BLOCK:]}


def write(path: Path, examples: list[dict[str, Any]], per_group: int, kind: Any = IDS) -> str:
    fields = pa.schema({"example_id": pa.string(), "input_ids": kind, "labels": kind})
    pq.write_table(pa.Table.from_pylist(examples, schema=fields), path, row_group_size=per_group)
    return str(path)
