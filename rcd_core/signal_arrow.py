"""ReferenceSignals as an Arrow table and back: one row per position, ragged lists, no padding.

Shapes: N positions, K kept entries at most.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Columns = tuple[Tensor, Tensor, Tensor, Tensor]  # topk_ids (N, K), topk_logprobs (N, K), entropy (N,), tail_mass (N,)


def to_table(columns: Columns, temperatures: tuple[float, float]) -> Any:
    """A pyarrow Table; K and the temperatures (alpha, delta) stand in the schema's metadata."""
    import pyarrow as pa

    topk_ids, topk_logprobs, entropy, tail_mass = (c.cpu() for c in columns)
    kept = torch.isfinite(topk_logprobs)
    offsets = pa.array([0, *kept.sum(1).cumsum(0).tolist()], pa.int32())
    ids, logprobs = topk_ids[kept].numpy(), topk_logprobs[kept].numpy()
    metadata = {
        "alpha_temperature": repr(temperatures[0]),
        "delta_temperature": repr(temperatures[1]),
        "top_k": str(topk_ids.shape[1]),
    }
    table = pa.table(
        {
            "topk_ids": pa.ListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
            "topk_logprobs": pa.ListArray.from_arrays(offsets, pa.array(logprobs, pa.float16())),
            "entropy": pa.array(entropy.numpy(), pa.float32()),
            "tail_mass": pa.array(tail_mass.numpy(), pa.float32()),
        }
    )
    return table.replace_schema_metadata(metadata)


def from_table(table: Any) -> tuple[Columns, tuple[float, float]]:
    """The columns and temperatures that `to_table` was given."""
    metadata = table.schema.metadata or {}
    ids, logprobs = (table[name].combine_chunks() for name in ("topk_ids", "topk_logprobs"))
    lengths = torch.from_numpy(ids.value_lengths().to_numpy(zero_copy_only=False).copy()).long()
    width = max(int(metadata.get(b"top_k", 0)), int(lengths.max()) if len(lengths) else 0)
    kept = torch.arange(width) < lengths[:, None]
    topk_ids = torch.zeros(len(lengths), width, dtype=torch.int32)
    topk_logprobs = torch.full((len(lengths), width), -math.inf, dtype=torch.float16)
    topk_ids[kept] = torch.from_numpy(ids.flatten().to_numpy(zero_copy_only=False).copy())
    topk_logprobs[kept] = torch.from_numpy(logprobs.flatten().to_numpy(zero_copy_only=False).copy())
    entropy, tail_mass = (torch.from_numpy(table[name].to_numpy().copy()) for name in ("entropy", "tail_mass"))
    temperatures = (float(metadata.get(b"alpha_temperature", 1.0)), float(metadata.get(b"delta_temperature", 1.0)))
    return (topk_ids, topk_logprobs, entropy, tail_mass), temperatures
