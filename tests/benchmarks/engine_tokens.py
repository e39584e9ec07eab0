"""Does a delta from the k largest entries change the text? Decodes the same requests both ways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rcd_core import Decoder, DecodeSettings, load_model
from tests.benchmarks.signals_data import GSM8K, SUDOKU, Workload, finished_run, make

SPARSE = (8, 32, 128)


def compare(workload: Workload, count: int, threshold: float) -> dict[str, Any]:
    """Share of requests and tokens equal to those with dense residuals, and relative passes. Decoding without
    residuals is included for scale."""
    model = load_model(workload.target)
    table = pq.read_table(workload.files[0]).slice(0, count)
    ids, labels = (table[name].to_pylist() for name in ("input_ids", "labels"))
    trained = [np.array(row) != -100 for row in labels]
    infill = all(not t[0] or t.all() for t in trained) and workload.block_length >= max(map(len, ids))
    dense = DecodeSettings(
        block_length=workload.block_length,
        max_new_tokens=64,
        confidence_threshold=threshold,
        residual=True,
        start="zero",
        alpha=workload.rule.alpha,
        alpha_scale=workload.rule.alpha_scale,
    )
    inputs = [
        np.where(t, model.mask_token_id, row).tolist() if infill else row[: int(np.argmax(t))]
        for row, t in zip(ids, trained, strict=True)
    ]
    arms = {"dense": dense, "none": replace(dense, residual=False)}
    arms |= {f"k={k}": replace(dense, residual_top_k=k) for k in SPARSE if k < model.vocab_size}
    decoder = Decoder(model)
    out = {name: (decoder.infill if infill else decoder.generate)(inputs, s) for name, s in arms.items()}
    passes = {name: sum(g.num_forwards.denoise for g in found) for name, found in out.items()}
    found: dict[str, Any] = {"requests": len(inputs), "vocab": model.vocab_size}
    for name in [n for n in arms if n != "dense"]:
        pairs = [(a.token_ids, b.token_ids) for a, b in zip(out[name], out["dense"], strict=True)]
        equal = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
        found[name] = {
            "requests_equal": sum(a == b for a, b in pairs) / len(pairs),
            "tokens_equal": equal / max(1, sum(max(len(a), len(b)) for a, b in pairs)),
            "passes": passes[name] / passes["dense"],
        }
    return found


def sparse_against_dense(demo: Path | None, data: Path | None, scratch: Path) -> dict[str, Any]:
    """On the demo's task, and on GSM8K if its questions are given (trains for a minute or two)."""
    workloads = [finished_run(demo) if demo else make(SUDOKU, scratch / "sudoku", None, 16_384)]
    if data is not None:
        workloads.append(make(GSM8K, scratch / "gsm8k", data, 4000))
    found = {}
    for workload in workloads:
        found[workload.name] = compare(workload, 256, 0.9 if workload.name in ("demo", "sudoku") else 0.5)
        print(f"sparse against dense, {workload.name}: {found[workload.name]}", flush=True)
    return found
