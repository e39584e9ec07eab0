"""Training: the cost of residuals over plain SFT, what the fused loss saves, and whether a resumed run is the same.

    python -m tests.benchmarks.training [--width 2048] [--depths 1,2] [--length 512] [--repeats 5]

On a CPU, a step is measured with SDAR-1.7B's width and vocabulary at two small depths and extrapolated linearly to 28
layers; both raw times are printed. On a GPU, whole models are measured, also with an online reference. Needs no Ray.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rcd_core import ReferenceSignals
from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.config import ModelConfig
from rcd_core.families.loading import new_model
from rcd_core.noise import NoiseSettings, mask_example
from rcd_core.ops.fused_loss import weighted_cross_entropy
from rcd_core.training.data.batches import Collator, MicroBatch
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.loss_module import LossModule
from rcd_core.training.meter import peak_flops
from rcd_core.training.objective import reference_signals
from rcd_core.training.settings import ResidualSettings, SignalRule, TrainSettings
from rcd_core.training.strategies import adamw
from tests.benchmarks.probe import header

VOCAB = 151_936
SHAPES = {  # hidden, layers, heads, kv heads, intermediate (semantics: SDAR = Qwen3)
    "sdar-1.7b": (2048, 28, 16, 8, 6144),
    "sdar-4b": (2560, 36, 32, 8, 9728),
}
BLOCK_LENGTH, TOP_K = 32, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="1,2", help="layers, on a CPU")
    parser.add_argument("--length", type=int, default=512, help="tokens of the row, on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--loss", choices=("fused", "naive"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loss:
        print(json.dumps(measure_loss(options.loss, options.vocab)))
        return
    print(header(), flush=True)
    gpu = torch.cuda.is_available()
    results: dict[str, Any] = {"resume_equal": resume_equal(), **compare_losses(options.vocab, options.repeats)}
    results |= whole_models(options.repeats) if gpu else two_depths(options)
    results["gpu"] = torch.cuda.get_device_name() if gpu else "not measured"
    print(json.dumps(results))


# -- one step


def make_model(shape: str, layers: int, vocab: int, device: torch.device, seed: int = 0) -> DiffusionModel:
    hidden, _, heads, kv_heads, intermediate = SHAPES[shape]
    config = ModelConfig(
        family="sdar",
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=intermediate,
        head_dim=128,
        max_positions=32768,
    )
    info = CheckpointInfo(mask_token_id=vocab - 1, eos_token_ids=(0,), pad_token_id=0, block_length=BLOCK_LENGTH)
    return new_model(config, vocab_size=vocab, info=info, seed=seed).to(device).requires_grad_(True).train()


def make_micro_batch(vocab: int, length: int, device: torch.device) -> MicroBatch:
    """One row, a quarter of it prompt, the rest masked with the mean probability 1/2."""
    generator = np.random.default_rng(0)
    ids = generator.integers(1, vocab - 1, length)
    labels = np.where(np.arange(length) >= length // 4, ids, -100)
    masked = (generator.random(length) < 0.5) & (labels >= 0)
    collator = Collator(
        settings=TrainSettings(steps=1, batch_size=1),
        residual=ResidualSettings(source="none", dropout=0.0),
        mask_token_id=vocab - 1,
        pad_token_id=0,
        block_length=BLOCK_LENGTH,
        block_diffusion=True,
    )
    (micro,) = collator.micro_batches([TrainingRow(0, "row", 0, ids, labels, masked, np.full(length, 0.5))])
    return micro.to(device)


def make_signals(count: int, vocab: int, device: torch.device) -> ReferenceSignals:
    """Random cached signals; only their sizes matter."""
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.log_softmax(torch.randn(count, TOP_K, generator=generator) * 2, -1) - 0.1
    ids = torch.randint(0, vocab, (count, TOP_K), generator=generator, dtype=torch.int32)
    entropy, tail = torch.rand(count, generator=generator) * 6, torch.full((count,), 1 - float(np.exp(-0.1)))
    return ReferenceSignals(ids, logprobs.half(), entropy, tail).to(device)


def step_times(
    model: DiffusionModel, micro: MicroBatch, methods: dict[str, Any], repeats: int
) -> dict[str, list[float]]:
    """Seconds of forward, backward and AdamW, the methods in turn; the first round is warm-up."""
    device = model.device
    optimizer = adamw(model.parameters(), TrainSettings(steps=1, batch_size=1, learning_rate=1e-5))
    times: dict[str, list[float]] = {name: [] for name in methods}
    for round_ in range(repeats + 1):
        for name, signals in methods.items():
            source: Any = "none" if signals is None else "signals"
            module = LossModule(model, "inverse_t", ResidualSettings(source=source, dropout=0.0))
            _wait(device)
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, _ = module(micro, signals() if callable(signals) else signals)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _wait(device)
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def two_depths(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cpu")
    depths = [int(d) for d in options.depths.split(",")]
    medians: dict[str, list[float]] = {"sft": [], "rcd": []}
    table = []
    for layers in depths:
        model = make_model("sdar-1.7b", layers, options.vocab, device)
        micro = make_micro_batch(options.vocab, options.length, device)
        signals = make_signals(int(micro.batch.masked.sum()), options.vocab, device)
        times = step_times(model, micro, {"sft": None, "rcd": signals}, options.repeats)
        ratios = [r / s for s, r in zip(times["sft"], times["rcd"], strict=True)]
        row = {"layers": layers, "ratio": statistics.median(ratios), "ratio_spread": [min(ratios), max(ratios)]}
        for name, values in times.items():
            medians[name].append(statistics.median(values))
            row[f"{name}_s"], row[f"{name}_s_spread"] = statistics.median(values), [min(values), max(values)]
        table.append(row)
        print(
            f"{layers} layers: sft {row['sft_s']:.3f} s, rcd {row['rcd_s']:.3f} s, ratio {row['ratio']:.3f}", flush=True
        )
        del model, micro, signals
    # A layer costs the same in both methods, and the residual the same at any depth. Extrapolating each method would
    # multiply the noise of its two measurements.
    full = SHAPES["sdar-1.7b"][1]
    few, more = medians["sft"]
    whole = few + (full - depths[0]) * (more - few) / (depths[1] - depths[0])
    added = statistics.mean(r - s for s, r in zip(medians["sft"], medians["rcd"], strict=True))
    ratio = 1 + added / whole
    print(f"{full} layers, extrapolated: sft {whole:.2f} s, the residual {added:.2f} s, ratio {ratio:.3f}")
    return {"rcd_vs_sft_step": ratio, "sft_extrapolated_s": whole, "depths": table, "length": options.length}


def whole_models(repeats: int) -> dict[str, Any]:
    """On a GPU: SFT, RCD cached and RCD online at whole sizes, one row per step."""
    device, rows = torch.device("cuda"), []
    ratio = float("nan")
    for shape, length in (("sdar-1.7b", 2048), ("sdar-1.7b", 8192), ("sdar-4b", 2048)):
        model = make_model(shape, SHAPES[shape][1], VOCAB, device)
        reference = make_model("sdar-1.7b", 28, VOCAB, device, seed=1).to(torch.bfloat16).requires_grad_(False).eval()
        micro = make_micro_batch(VOCAB, length, device)
        signals = make_signals(int(micro.batch.masked.sum()), VOCAB, device)
        online = partial(reference_signals, reference, micro.batch, SignalRule(top_k=TOP_K))
        torch.cuda.reset_peak_memory_stats()
        times = step_times(model, micro, {"sft": None, "rcd": signals, "online": online}, repeats)
        assert micro.batch.packed is not None
        entered, masked = int(micro.batch.packed.valid.sum()), int(micro.batch.masked.sum())
        body = model.num_parameters() - 2 * model.embedding.weight.numel()
        flops = 6 * (body * entered + model.lm_head_weight.numel() * masked)
        for name, values in times.items():
            seconds = statistics.median(values)
            row = {"shape": shape, "length": length, "arm": name, "seconds": seconds, "tokens_per_s": length / seconds}
            row["mfu"] = flops / seconds / (peak_flops(device) or float("nan"))
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            rows.append(row)
            print(json.dumps(row), flush=True)
        if shape == "sdar-1.7b" and length == 8192:
            ratio = statistics.median(times["rcd"]) / statistics.median(times["sft"])
        del model, reference, online
        torch.cuda.empty_cache()
    return {"rcd_vs_sft_step": ratio, "whole_models": rows}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# -- the loss


def compare_losses(vocab: int, repeats: int) -> dict[str, Any]:
    """Peak memory and time of head and loss, each method in its own processes."""
    medians: dict[str, dict[str, float]] = {}
    for method in ("fused", "naive"):
        runs = []
        for _ in range(min(repeats, 3)):
            command = [sys.executable, "-m", "tests.benchmarks.training", "--loss", method, "--vocab", str(vocab)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            runs.append(json.loads(output.splitlines()[-1]))
        medians[method] = {k: statistics.median(r[k] for r in runs) for k in runs[0]}
        seconds = [r["seconds"] for r in runs]
        print(
            f"loss {method}: {medians[method]['peak_mib']:.0f} MiB above inputs and gradients, "
            f"{medians[method]['seconds']:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}, {len(runs)} runs)",
            flush=True,
        )
    ratio = medians["fused"]["peak_mib"] / medians["naive"]["peak_mib"]
    return {"fused_loss_peak_ratio": ratio, "fused_loss": medians["fused"], "naive_loss": medians["naive"]}


def measure_loss(method: str, vocab: int, rows: int = 2048, width: int = 256) -> dict[str, float]:
    """Extra MiB and seconds of forward and backward over `rows` masked positions."""
    from tests.benchmarks.attention import _peak_bytes, _reset_peak

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden = torch.randn(rows, width, device=device, requires_grad=True)
    head = torch.randn(vocab, width, device=device).mul_(width**-0.5).requires_grad_(True)
    labels, weights = torch.randint(0, vocab, (rows,), device=device), torch.rand(rows, device=device)
    hidden.grad, head.grad = torch.zeros_like(hidden), torch.zeros_like(head)
    _reset_peak(device)
    before, start = _peak_bytes(device), time.perf_counter()
    if method == "fused":
        loss, _ = weighted_cross_entropy(hidden, head, labels, weights)
    else:
        loss = (torch.nn.functional.cross_entropy(hidden @ head.T, labels, reduction="none") * weights).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    _wait(device)
    return {"peak_mib": (_peak_bytes(device) - before) / 2**20, "seconds": time.perf_counter() - start}


# -- resume


def resume_equal() -> bool:
    """Whether a run that resumes from its middle ends in the same bits as an uninterrupted one."""
    noise = NoiseSettings()

    class Rows:
        def row(self, index: int) -> TrainingRow:
            ids = np.random.default_rng(index % 8).integers(1, 90, 24)
            labels = np.where(np.arange(24) >= 8, ids, -100)
            masked, p = mask_example(labels >= 0, str(index), 0, noise)
            return TrainingRow(index, str(index), 0, ids, labels, masked, p)

    def run(**options: Any) -> dict[str, torch.Tensor]:
        config = ModelConfig(
            family="sdar", hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=64
        )
        info = CheckpointInfo(mask_token_id=99, eos_token_ids=(0,), pad_token_id=0, block_length=8)
        model = new_model(config, vocab_size=100, info=info, seed=0)
        settings = TrainSettings(steps=8, batch_size=4, learning_rate=1e-2, checkpoint_every=4, schedule="cosine")
        plain = ResidualSettings(source="none", dropout=0.0)
        save = options.pop("save", lambda step, write: None)
        callbacks = Callbacks(lambda line: None, save)
        return train(model, Rows(), settings, plain, 8, callbacks, **options)

    with tempfile.TemporaryDirectory() as directory:
        whole = run(save=lambda step, write: write(Path(directory) / str(step)))
        resumed = run(resume=Path(directory) / "4")
    equal = all(torch.equal(whole[name], resumed[name]) for name in whole)
    print(f"resumed equals uninterrupted: {equal}", flush=True)
    return equal


if __name__ == "__main__":
    main()
