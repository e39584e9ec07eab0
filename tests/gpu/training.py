"""Training: model FLOPs utilisation. Signals: the stage's encoding against the bare forward."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from rcd_core.attention.backends import backend_key
from rcd_core.families.base import DiffusionModel
from rcd_core.training.data.batches import MicroBatch
from rcd_core.training.loss_module import LossModule
from rcd_core.training.meter import peak_flops
from rcd_core.training.objective import masked_hidden, reference_signals
from rcd_core.training.settings import ResidualSettings, SignalRule, TrainSettings
from rcd_core.training.strategies import DataParallel, compile_layers
from tests.benchmarks.training import make_micro_batch, make_signals
from tests.gpu.common import Run

VARIANTS = (("flex", True), ("flex", False), ("sdpa", False))


def utilisation(run: Run) -> list[dict[str, Any]]:
    """SFT and RCD on cached signals, one packed row of 4,096 tokens, bf16 with fp32 master weights and AdamW; layers
    compiled or not, two attentions."""
    rows: list[dict[str, Any]] = []
    for shape in ("1.7b",) if run.rehearse else ("1.7b", "4b"):
        for attention, compiled in (("sdpa", False),) if run.rehearse else VARIANTS:
            for source in ("none", "signals"):
                row: dict[str, Any] = {"shape": shape, "attention": attention, "compiled": compiled, "source": source}
                rows.append(row)
                if run.left < (0 if run.rehearse else 10):
                    row["left out"] = "no time"
                    continue
                try:
                    row |= _step_time(run, shape, attention, source, compiled)
                except torch.OutOfMemoryError as error:
                    row["left out"] = str(error).splitlines()[0]
                run.release()
    return rows


def _step_time(run: Run, shape: str, attention: str, source: str, compiled: bool) -> dict[str, Any]:
    length = 64 if run.rehearse else 4096
    model = run.model(shape, torch.float32).requires_grad_(True).train()
    model.config._attn_implementation = backend_key(attention, run.device)
    model.activation_checkpointing = True
    if compiled:
        compile_layers(model)
    micro = make_micro_batch(run.vocab, length, run.device)
    masked = int(micro.batch.masked.sum())
    signals = make_signals(masked, run.vocab, run.device) if source == "signals" else None
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    config = TrainSettings(steps=1, batch_size=1, dtype="bfloat16")
    module = LossModule(model, "inverse_t", ResidualSettings(source=source, dropout=0.0))  # type: ignore[arg-type]
    strategy = DataParallel(module, config, run.device)
    times = []
    for _ in range(2 if run.rehearse else 6):
        begun = run.wait()
        with strategy.autocast():
            loss, _ = strategy.module(micro, signals)
        strategy.backward(loss / masked)
        strategy.step(1e-6)
        times.append(run.wait() - begun)
        if run.left < 0:
            break
    seconds = statistics.median(times[1:] or times)
    peak = peak_flops(run.device)
    row = {"seconds": seconds, "spread": [min(times), max(times)], "tokens_per_s": length / seconds}
    row["mfu"] = peak and _flops(model, micro) / seconds / peak
    if run.device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated(run.device) / 2**30
    return row


def _flops(model: DiffusionModel, micro: MicroBatch) -> float:
    """6 for each weight and token, as training/meter.py counts; what checkpointing computes twice is not counted."""
    assert micro.batch.packed is not None
    head = model.lm_head_weight.numel()
    layers = model.num_parameters() - head - model.embedding.weight.numel()
    return 6.0 * (layers * int(micro.batch.packed.valid.sum()) + head * int(micro.batch.masked.sum()))


@torch.inference_mode()
def signals(run: Run) -> dict[str, Any]:
    """The 1.7B reference on a row of 4,096 tokens: signals of all masked positions against forward and head alone."""
    model = run.model("1.7b")
    micro = make_micro_batch(run.vocab, 64 if run.rehearse else 4096, run.device)

    def bare() -> None:
        for part in masked_hidden(model, micro.batch, None).split(256):
            model.head(part)

    def encoded() -> None:
        reference_signals(model, micro.batch, SignalRule(top_k=32))

    times: dict[str, list[float]] = {"bare": [], "signals": []}
    for round_ in range(2 if run.rehearse else 8):
        for name, function in (("bare", bare), ("signals", encoded)):
            begun = run.wait()
            function()
            if round_:
                times[name].append(run.wait() - begun)
        if run.left < 0 and times["bare"]:
            break
    ratios = [a / b for a, b in zip(times["bare"], times["signals"], strict=True)]
    return {
        "bare_s": statistics.median(times["bare"]),
        "signals_s": statistics.median(times["signals"]),
        "bare / signals": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
    }
