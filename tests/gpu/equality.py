"""Equality: attention backends, captured passes, bf16 against fp32, and a resumed training."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rcd_core.attention.paged_backends import paged_backend
from rcd_core.decoding.chunk import Chunk
from rcd_core.decoding.cuda_graphs import DevicePass, GraphCache
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.model_runner import Forward
from rcd_core.decoding.pages import PagedCache, page_size_of
from rcd_core.decoding.request import make_sequence
from rcd_core.decoding.tables import Tables
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.noise import NoiseSettings, mask_example
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.settings import ResidualSettings, TrainSettings
from tests.gpu.common import Run, prompts, settings

HIDDEN_BOUND = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # ||a - b|| / ||b|| of final hidden states
BF16_BOUND = 5e-2  # the same, of a bf16 model against its fp32 copy


@torch.inference_mode()
def hidden_states(model: DiffusionModel, attention: str) -> torch.Tensor:
    """Three requests: a prompt in chunks, then a pass over one block of each."""
    lengths, b = (300, 70, 33), 8
    page = page_size_of(model.device)
    tables = Tables(len(lengths), 320, page)
    tables.fill()
    backend = paged_backend(attention, model.config, model.dtype, model.device, page)
    forward = Forward(model, PagedCache(model, tables.num_pages, page), tables, 320, backend)
    several = prompts(len(lengths), 320, model.vocab_size)
    found = []
    for start, end in ((0, 0.5), (0.5, 1.0)):
        chunks = []
        for slot, (ids, n) in enumerate(zip(several, lengths, strict=True)):
            first, last = int(start * n) // b * b, int(end * n) // b * b
            chunks.append((slot, [Chunk(np.array(ids[first:last]), first, last, b)]))
        found.append(forward.hidden(forward.pack(chunks)))
    blocks = [(slot, [Chunk(np.array(ids[:b]), n // b * b, n // b * b + b, b)])
              for slot, (ids, n) in enumerate(zip(several, lengths, strict=True))]  # fmt: skip
    found.append(forward.hidden(forward.pack(blocks)))
    return torch.cat(found).float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def backends(run: Run) -> dict[str, Any]:
    """Every attention that runs here against eager, by final hidden states."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = run.model("small", dtype)
        expected = hidden_states(model, "eager")
        for name in ("sdpa", "varlen", "flash"):
            key = f"{name} {str(dtype).removeprefix('torch.')}"
            try:
                found[key] = distance(hidden_states(model, name), expected)
            except UserError as error:
                found[key] = f"not here: {error}"
                continue
            found[f"{key} ok"] = found[key] <= HIDDEN_BOUND[dtype]
    return found


class Direct(GraphCache):
    """Calls the function that would be captured."""

    def __call__(self, key: Any, inputs: Any, warmup_inputs: Any, run: DevicePass) -> Any:
        return run(torch.from_numpy(inputs).to(self.device))


def decode(model: DiffusionModel, several: list[list[int]], s: Any, fixed: bool, direct: bool = False) -> list[Any]:
    requests = [make_sequence(model, p, s, infill=False, has_reference=False) for p in several]
    longest = max(len(r.canvas) for r in requests)
    engine = Engine(model, None, max_batch=len(requests), max_length=longest, fixed_shapes=fixed)
    if direct:
        engine._runner.graphs = Direct(model.device)
    for request in requests:
        engine.add(request)
    while engine.busy:
        engine.step()
    return [request.output().token_ids for request in requests]


def captured(run: Run) -> dict[str, Any]:
    """Captured passes against direct calls of the same functions, which must give the same tokens. The share that
    passes without fixed shapes give is for information: there, sums have another order."""
    model, found = run.model("small"), {}
    several = prompts(4 if run.rehearse else 8, 40, model.vocab_size)
    plain = settings(8, 16 if run.rehearse else 32, seed=3)
    residual = replace(plain, residual=True, start="zero")
    for name, s in (
        ("greedy", plain),
        ("drawn", replace(plain, temperature=0.8, top_k=50, top_p=0.9)),
        ("dense", residual),
        ("sparse", replace(residual, residual_top_k=32)),
        ("dirichlet", replace(residual, start="dirichlet")),
    ):
        captured = decode(model, several, s, fixed=True)
        found[f"{name} ok"] = captured == decode(model, several, s, fixed=True, direct=True)
        free = decode(model, several, s, fixed=False)
        same = [a == b for a, b in zip(captured, free, strict=True)]
        found[f"{name}, requests equal to free shapes"] = float(np.mean(same))
    return found


def precision(run: Run) -> dict[str, Any]:
    """A bf16 model against the same weights in fp32."""
    low = run.model("small", torch.bfloat16)
    high = run.model("small", torch.float32)
    high.load_state_dict(low.state_dict())
    a, b = hidden_states(low, "auto"), hidden_states(high, "sdpa")
    logits = [model.head(h.to(model.dtype)).float() for model, h in ((low, a), (high, b))]
    agree = float((logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean())
    error = distance(a, b)
    return {"distance": error, "same most probable token": agree, "ok": error <= BF16_BOUND}


class Rows:
    def row(self, index: int) -> TrainingRow:
        ids = np.random.default_rng(index % 8).integers(1, 90, 48)
        labels = np.where(np.arange(48) >= 8, ids, -100)
        masked, p = mask_example(labels >= 0, str(index), 0, NoiseSettings())
        return TrainingRow(index, str(index), 0, ids, labels, masked, p)


def resume(run: Run) -> dict[str, Any]:
    """A training that resumes from its middle against an uninterrupted one, in fp32 and in bf16. On CUDA, sums by
    `index_add_` and `scatter_add_` have no fixed order, so bits may differ (faults.md D9)."""
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):

        def once(dtype: str = dtype, **options: Any) -> dict[str, torch.Tensor]:
            model = run.model("tiny", torch.float32, block_length=8).requires_grad_(True)
            config = TrainSettings(
                steps=6,
                batch_size=4,
                learning_rate=1e-3,
                checkpoint_every=3,
                dtype=dtype,  # type: ignore[arg-type]
            )
            save = options.pop("save", lambda step, write: None)
            plain = ResidualSettings(source="self", dropout=0.0)
            callbacks = Callbacks(lambda line: None, save)
            return train(model, Rows(), config, plain, 8, callbacks, noise=NoiseSettings(), **options)

        with tempfile.TemporaryDirectory() as directory:
            where = Path(directory)
            whole = once(save=lambda step, write, where=where: write(where / str(step)))
            resumed = once(resume=where / "3")
        worst = max(float((whole[n] - resumed[n]).abs().max()) for n in whole)
        found[f"{dtype} largest difference"] = worst
        found[f"{dtype} ok"] = worst <= (0.0 if run.device.type == "cpu" else 1e-3)
    return found
