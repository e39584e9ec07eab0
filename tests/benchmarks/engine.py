"""The decoding engine: overhead over bare forwards, batched against one by one, RCD passes against SeqD passes.

    python -m tests.benchmarks.engine [--demo DIR] [--data FILE] [--repeats 3]

--demo: a finished run of the recipe `demo`. Without it, its model is random, or trained for a minute where tokens are
compared. --data: GSM8K's training questions, for that comparison. Passes at SDAR-1.7B's width use random weights.
Only generated tokens up to eos count. Needs no Ray. On a CPU: one thread for the demo's model, all threads otherwise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rcd_core import Decoder, DecodeSettings, load_model
from rcd_core.attention.paged_backends import paged_backend
from rcd_core.decoding.chunk import Chunk
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.model_runner import Forward, Packed
from rcd_core.decoding.pages import PagedCache, page_size_of
from rcd_core.decoding.request import make_sequence
from rcd_core.decoding.tables import Tables
from rcd_core.families.base import DiffusionModel
from rcd_core.families.config import ModelConfig
from tests.benchmarks.engine_memory import transients
from tests.benchmarks.engine_tokens import sparse_against_dense
from tests.benchmarks.models import DEMO, VOCAB, random_model
from tests.benchmarks.probe import header

PASSES_PER_SAMPLE = 200  # at least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="directory of a finished run of the recipe `demo`")
    parser.add_argument("--data", type=Path, help="GSM8K's training questions as JSON Lines")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    options = parser.parse_args()
    print(header(), flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    demo = options.demo.expanduser() if options.demo else None
    model = load_model(demo / "target" / "model") if demo else random_model(DEMO, 320)
    found: dict[str, Any] = {}
    found |= against_bare_forwards(model, options)
    found |= batched_against_single(model, options)
    torch.set_num_threads(threads)
    found |= rcd_against_seqd(options.repeats)
    with tempfile.TemporaryDirectory() as scratch:
        found["sparse_against_dense"] = sparse_against_dense(demo, options.data, Path(scratch))
    found |= transients()
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "not measured"
    print(json.dumps(found))


def requests(model: DiffusionModel, count: int, block_length: int, new_tokens: int) -> tuple[list[list[int]], Any]:
    """Prompts of 16 to 47 tokens. A static schedule of two tokens a pass, so that every model makes the same passes."""
    generator = np.random.default_rng(0)
    highest = min(model.vocab_size, 260) - 1
    prompts = [generator.integers(10, highest, 16 + i % 32).tolist() for i in range(count)]
    settings = DecodeSettings(
        block_length=block_length,
        denoising_steps=max(1, block_length // 2),
        policy="low_confidence_static",
        max_new_tokens=new_tokens,
        stop_token_ids=(),
    )
    return prompts, settings


Call = tuple[Packed, Any]  # a pass and the tokens whose hidden states were asked for


def record_passes(engine: Engine) -> list[Call]:
    """Records the input of each pass, so that the bare forwards can be repeated without the engine."""
    calls: list[Call] = []
    inner = engine._runner.forward.hidden

    def hidden(packed: Packed, at: Any = None) -> torch.Tensor:
        rows = replace(packed.rows, tables=packed.rows.tables.copy())
        calls.append((replace(packed, shape=replace(packed.shape, has_residual=False), rows=rows), at))
        return inner(packed, at)

    engine._runner.forward.hidden = hidden  # type: ignore[method-assign]
    return calls


def run_engine(
    model: DiffusionModel, prompts: Any, settings: Any, record: bool = False, infill: bool = False
) -> tuple[float, Any, Any]:
    """Returns seconds, the engine, and the recorded passes, if any."""
    sequences = [make_sequence(model, p, settings, infill=infill, has_reference=False) for p in prompts]
    engine = Engine(model, None, max_batch=len(prompts), max_length=max(len(s.canvas) for s in sequences))
    calls = record_passes(engine) if record else []
    start = time.perf_counter()
    for s in sequences:
        engine.add(s)
    while engine.busy:
        engine.step()
    return time.perf_counter() - start, engine, calls


def boards(model: DiffusionModel, count: int) -> tuple[list[list[int]], DecodeSettings]:
    """Requests like the demo's: one block of 37 tokens, 20 to 28 of them masked, two committed per pass."""
    generator = np.random.default_rng(0)
    canvases = generator.integers(10, min(model.vocab_size, 260) - 1, (count, 37))
    for i, row in enumerate(canvases):
        row[generator.permutation(37)[: 20 + i % 9]] = model.mask_token_id
    settings = DecodeSettings(block_length=37, denoising_steps=19, policy="low_confidence_static")
    return canvases.tolist(), settings


@torch.inference_mode()
def run_bare(model: DiffusionModel, calls: list[Call], engine: Engine, whole: bool = False) -> float:
    """The same forwards with prepared inputs and the head on the masked rows, without residuals and sampling. whole:
    with the last layer of all tokens."""
    forward = engine._runner.forward
    inputs = [(torch.from_numpy(p.integers), p, torch.from_numpy(at), len(at)) for p, at in calls]
    start = time.perf_counter()
    for integers, packed, at, count in inputs:
        hidden = forward.run(integers, packed.shape, packed.rows, None if whole else at)
        if count:
            model.head(hidden[:count])
    return time.perf_counter() - start


def against_bare_forwards(model: DiffusionModel, options: argparse.Namespace) -> dict[str, Any]:
    """The demo's task, and text in blocks of 8. Those passes are smaller, so the engine's share is larger."""
    found: dict[str, Any] = {}
    text, board = requests(model, options.requests, 8, 64), boards(model, options.requests)
    for task, (prompts, settings), infill in (("boards", board, True), ("blocks_of_8", text, False)):
        residual = replace(settings, residual=True, start="zero")
        for name, s in (("seqd", settings), ("rcd", residual), ("rcd_sparse", replace(residual, residual_top_k=32))):
            _, engine, calls = run_engine(model, prompts, s, record=True, infill=infill)
            pairs = []
            runs = -(-PASSES_PER_SAMPLE // len(calls))  # short samples are dominated by noise
            for _ in range(options.repeats + 1):
                ours = sum(run_engine(model, prompts, s, infill=infill)[0] for _ in range(runs)) / runs
                bare = [sum(run_bare(model, calls, engine, w) for _ in range(runs)) / runs for w in (False, True)]
                pairs.append((ours, *bare))
            for column, what in ((1, "bare"), (2, "whole")):
                ratios = [times[0] / times[column] for times in pairs[1:]]
                found[f"{name}_engine_vs_{what}_{task}"] = statistics.median(ratios)
                print(
                    f"engine / {what} forwards, {task}, {name}: {statistics.median(ratios):.3f} "
                    f"({min(ratios):.3f} to {max(ratios):.3f}), "
                    f"{len(calls)} passes, engine {statistics.median(times[0] for times in pairs[1:]):.2f} s",
                    flush=True,
                )
            found["store_passes_saved"] = engine.statistics.merged_stores
    # The worse of the two.
    found["engine_vs_bare_passes"] = max(found[f"seqd_engine_vs_bare_{task}"] for task in ("boards", "blocks_of_8"))
    return found


@torch.inference_mode()
def authors_loop(model: DiffusionModel, prompt: list[int], s: DecodeSettings) -> list[int]:
    """One prompt as the authors' generate.py decodes it: prompt blocks first, then passes over each block and a
    separate pass to store it."""
    b, steps = s.block_length or 1, s.denoising_steps or 1
    length = -(-(len(prompt) + s.max_new_tokens) // b) * b
    canvas = np.full(length, model.mask_token_id, dtype=np.int64)
    canvas[: len(prompt)] = prompt
    tables = Tables(1, length, page_size_of(model.device))
    tables.fill()
    backend = paged_backend("auto", model.config, model.dtype, model.device, tables.page_size)
    forward = Forward(model, PagedCache(model, tables.num_pages, tables.page_size), tables, length, backend)

    def run(start: int, end: int) -> torch.Tensor:
        return forward.hidden(forward.pack([(0, [Chunk(canvas[start:end], start, end, b)])]))

    first = len(prompt) // b * b
    if first:
        run(0, first)
    for start in range(first, length, b):
        block = slice(start, start + b)
        for step in range(steps):
            masked = torch.from_numpy(canvas[block] == model.mask_token_id)
            if not masked.any():
                break
            logits = model.head(run(start, start + b))
            logits[:, model.mask_token_id] = float("-inf")
            confidence, tokens = torch.softmax(logits, -1).max(-1)
            quota = min(b // steps + (step < b % steps), int(masked.sum()))
            chosen = torch.where(masked, confidence, -1.0).topk(quota).indices
            canvas[start + chosen.numpy()] = tokens[chosen].numpy()
        run(start, start + b)
    return canvas[len(prompt) :][: s.max_new_tokens].tolist()


def batched_against_single(model: DiffusionModel, options: argparse.Namespace) -> dict[str, Any]:
    """Rounding differs between batch sizes, so a CPU may decide a near tie differently: such tokens are counted."""
    prompts, settings = requests(model, options.requests, 8, 64)
    ratios = []
    for round_ in range(options.repeats + 1):
        start = time.perf_counter()
        alone = [authors_loop(model, p, settings) for p in prompts]
        one_by_one = time.perf_counter() - start
        start = time.perf_counter()
        together = [g.token_ids for g in Decoder(model).generate(prompts, settings)]
        batched = time.perf_counter() - start
        if round_:
            ratios.append(one_by_one / batched)
    tokens = sum(map(len, together))
    differing = sum(a != b for row in zip(alone, together, strict=True) for a, b in zip(*row, strict=True))
    print(
        f"{len(prompts)} requests one by one / batched: {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.2f}); batched {tokens / batched:.0f} tokens/s; {differing} of {tokens} tokens differ",
        flush=True,
    )
    ratio = statistics.median(ratios)
    return {"batched_vs_single": ratio, "tokens_per_s": tokens / batched, "differing_tokens": differing}


def rcd_against_seqd(repeats: int) -> dict[str, Any]:
    """One block of 32 for two requests at SDAR-1.7B's width and vocabulary; one position is committed per pass.

    The full model has 28 layers, and the residual's cost does not depend on them. Its seconds are measured at 1 and 3
    layers and compared with a pass of 28 layers, extrapolated linearly from both. Raw times are printed.
    """
    config = ModelConfig(
        family="sdar",
        hidden_size=2048,
        num_layers=1,
        num_heads=16,
        num_kv_heads=8,
        intermediate_size=6144,
        head_dim=128,
        max_positions=4096,
    )
    seconds: dict[tuple[str, int], float] = {}
    for layers in (1, 3):
        model = random_model(replace(config, num_layers=layers), VOCAB)
        generator = np.random.default_rng(0)
        prompts = [generator.integers(1, 1000, 64).tolist() for _ in range(2)]
        plain = DecodeSettings(block_length=32, max_new_tokens=32, policy="low_confidence_static", stop_token_ids=())
        arms = {
            "seqd": plain,
            "sparse": replace(plain, residual=True, start="zero", residual_top_k=32),
            "dense": replace(plain, residual=True, start="zero"),
        }
        times: dict[str, list[float]] = {name: [] for name in arms}
        for round_ in range(repeats + 1):
            for name, s in arms.items():
                taken = timed_passes(model, prompts, s, 4)
                if round_:
                    times[name].append(taken)
        for name, values in times.items():
            seconds[name, layers] = statistics.median(values)
            print(
                f"pass at 1.7B width, {layers} layers, {name}: {statistics.median(values) * 1e3:.1f} ms "
                f"({min(values) * 1e3:.1f} to {max(values) * 1e3:.1f})",
                flush=True,
            )
        del model
    layer = (seconds["seqd", 3] - seconds["seqd", 1]) / 2
    whole = seconds["seqd", 1] + 27 * layer
    found: dict[str, Any] = {"seqd_pass_28_layers_s": whole}
    for name in ("sparse", "dense"):
        own = statistics.mean(seconds[name, n] - seconds["seqd", n] for n in (1, 3))
        found[f"rcd_{name}_vs_seqd_pass"] = 1 + own / whole
        found[f"rcd_{name}_vs_seqd_pass_one_layer"] = seconds[name, 1] / seconds["seqd", 1]
    found["rcd_vs_seqd_pass"] = found["rcd_sparse_vs_seqd_pass"]
    print(json.dumps({k: round(v, 4) for k, v in found.items()}), flush=True)
    return found


def timed_passes(model: DiffusionModel, prompts: list[list[int]], s: DecodeSettings, passes: int) -> float:
    """Mean seconds of the second to fifth denoising pass, where input and output both have residuals."""
    sequences = [make_sequence(model, p, s, infill=False, has_reference=False) for p in prompts]
    engine = Engine(model, None, max_batch=len(prompts), max_length=max(len(q.canvas) for q in sequences))
    for q in sequences:
        engine.add(q)
    while sequences[0].forwards.denoise < 1:
        engine.step()
    start = time.perf_counter()
    for _ in range(passes):
        engine.step()
    return (time.perf_counter() - start) / passes


if __name__ == "__main__":
    main()
