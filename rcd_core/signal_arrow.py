"""ReferenceSignals as an Arrow table and back: one row per position, ragged lists without padding.

Shapes: N positions, K kept entries at most.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Columns = tuple[Tensor, Tensor, Tensor, Tensor]  # topk_ids (N, K), topk_logprobs (N, K), entropy (N,), tail_mass (N,)


def to_table(columns: Columns, temperatures: tuple[float, float], confidence: Tensor | None = None) -> Any:
    """A pyarrow Table; K and the temperatures (alpha, delta) are in the schema's metadata. confidence (N,) is a column
    of its own, which older readers skip."""
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
    extra = {} if confidence is None else {"confidence": pa.array(confidence.cpu().numpy(), pa.float32())}
    table = pa.table(
        {
            "topk_ids": pa.ListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
            "topk_logprobs": pa.ListArray.from_arrays(offsets, pa.array(logprobs, pa.float16())),
            "entropy": pa.array(entropy.numpy(), pa.float32()),
            "tail_mass": pa.array(tail_mass.numpy(), pa.float32()),
            **extra,
        }
    )
    return table.replace_schema_metadata(metadata)


def from_table(table: Any) -> tuple[Columns, tuple[float, float], Tensor | None]:
    """The arguments of `to_table`."""
    metadata = table.schema.metadata or {}
    lists = [table[name].combine_chunks() for name in ("topk_ids", "topk_logprobs")]
    lengths = torch.from_numpy(lists[0].value_lengths().to_numpy(zero_copy_only=False).copy()).long()
    width = max(int(metadata.get(b"top_k", 0)), int(lengths.max()) if len(lengths) else 0)
    ids, logprobs = (torch.from_numpy(values.flatten().to_numpy(zero_copy_only=False).copy()) for values in lists)
    entropy, tail_mass = (torch.from_numpy(table[name].to_numpy().copy()) for name in ("entropy", "tail_mass"))
    temperatures = (float(metadata.get(b"alpha_temperature", 1.0)), float(metadata.get(b"delta_temperature", 1.0)))
    has_confidence = "confidence" in table.column_names
    confidence = torch.from_numpy(table["confidence"].to_numpy().copy()) if has_confidence else None
    return (*pad_entries(ids, logprobs, lengths, width), entropy, tail_mass), temperatures, confidence


def pad_entries(ids: Tensor, logprobs: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Entries end to end, lengths (N,) of them per position -> topk_ids (N, width) int32 padded with 0, topk_logprobs
    (N, width) fp16 padded with -inf."""
    kept = torch.arange(width) < lengths[:, None]
    topk_ids = torch.zeros(kept.shape, dtype=torch.int32)
    topk_logprobs = torch.full(kept.shape, -math.inf, dtype=torch.float16)
    topk_ids[kept], topk_logprobs[kept] = ids, logprobs
    return topk_ids, topk_logprobs
