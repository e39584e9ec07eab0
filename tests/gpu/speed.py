"""Decoding: tokens/s and passes/s against what bandwidth and arithmetic allow, and peak memory against the plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from rcd_core.decoding.engine import Engine
from rcd_core.decoding.memory import engine_memory
from rcd_core.decoding.request import make_sequence
from rcd_core.families.base import DiffusionModel
from tests.gpu.common import Run, bounds, prompts, settings

PROMPT = 256


def decoding(run: Run, shapes: Iterable[str], blocks: Iterable[int], batches: Iterable[int]) -> list[dict[str, Any]]:
    """Each measurement in a row of its own; what no time was left for, too."""
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        model = None
        for block in blocks:
            for batch in batches:
                for method in ("seqd", "rcd", "rcd 32 ids"):
                    row: dict[str, Any] = {"shape": shape, "block": block, "batch": batch, "method": method}
                    rows.append(row)
                    if run.left < (0 if run.rehearse else 8):
                        row["left out"] = "no time"
                        continue
                    try:
                        model = model or run.model(shape)
                        row |= measure(run, model, block, batch, method)
                    except torch.OutOfMemoryError as error:
                        row["left out"] = str(error).splitlines()[0]
                    run.release()
        del model
        run.release()
    return rows


def measure(run: Run, model: DiffusionModel, block: int, batch: int, method: str) -> dict[str, Any]:
    """Steady passes: the prompts are stored, and every shape has been captured."""
    length = 16 if run.rehearse else PROMPT
    s = settings(block, 64 if run.rehearse else 64 * block)
    if method != "seqd":
        s = replace(s, residual=True, start="zero", residual_top_k=32 if method != "rcd" else None)
    several = [
        make_sequence(model, p, s, infill=False, has_reference=False) for p in prompts(batch, length, model.vocab_size)
    ]
    longest = max(len(r.canvas) for r in several)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    before = _allocated(run)
    engine = Engine(model, None, max_batch=batch, max_length=longest)
    for request in several:
        engine.add(request)
    while min(request.block_index for request in several) < 2 and not any(r.finished for r in several):
        engine.step()
    masks, passes, seconds = _masks(several), 0, 0.0
    context = sum(request.block[1] for request in several)
    begun = run.wait()
    while engine.busy and seconds < (0.02 if run.rehearse else 2.0) and run.left > 0:
        engine.step()
        passes += 1
        seconds = run.wait() - begun
    tokens = masks - _masks(several)
    masked = tokens / max(1, passes) * (s.denoising_steps or 1) / 2  # mean over a block
    limits = bounds(model, batch, batch * block, max(1, round(masked)), context)
    row: dict[str, Any] = {
        "tokens_per_s": tokens / seconds,
        "passes_per_s": passes / seconds,
        "pass_ms": 1e3 * seconds / passes,
        "passes": passes,
        "attention": engine._runner.forward.backend.name,
        "captured": engine._runner.fixed_shapes,
        **limits,
    }
    known = [limit for limit in limits.values() if limit]
    row["of_bound"] = row["passes_per_s"] / min(known) if known else None
    if run.device.type == "cuda":
        row["peak_gib"] = (torch.cuda.max_memory_allocated(run.device) - before) / 2**30
    backend = engine._runner.forward.backend
    row["planned_gib"] = engine_memory(model, batch, longest, block, backend=backend).total / 2**30
    return row


def _masks(several: list[Any]) -> int:
    return sum(int((r.canvas == r.model.mask_token_id).sum()) for r in several)


def _allocated(run: Run) -> int:
    return torch.cuda.memory_allocated(run.device) if run.device.type == "cuda" else 0


def first_sizes(run: Run) -> list[dict[str, Any]]:
    if run.rehearse:
        return decoding(run, ["4b"], [4], [1, 3])
    return decoding(run, ["4b"], [4, 32], [1, 128])


def all_sizes(run: Run) -> list[dict[str, Any]]:
    if run.rehearse:
        return decoding(run, ["1.7b"], [8], [2])
    return decoding(run, ["1.7b", "4b", "8b"], [4, 32, 64], [1, 32, 128])
