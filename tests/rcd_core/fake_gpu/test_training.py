"""Training on a fake GPU, in bf16. Faults D2 and D10 have their tests here.

The whole loop runs, but for autograd's backward pass, which PyTorch refuses on a CPU build: gradients of our own
functions are computed by direct calls, the others are made up. "parameters": what FSDP2 and DeepSpeed compute with,
bf16 parameters without autocast; their communication is not shown.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rcd_core import ReferenceSignals
from rcd_core.attention import backends
from rcd_core.noise import NoiseSettings, mask_example
from rcd_core.ops import fused_loss, residual_embedding
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.settings import ResidualSettings, SignalRule, TrainSettings
from rcd_core.training.strategies import DataParallel
from tests.rcd_core.fake_gpu.device import FakeGpu
from tests.rcd_core.fake_gpu.flash_attn_stub import flash_attn_stub
from tests.rcd_core.fake_gpu.models import VOCAB, fake_model

NOISE = NoiseSettings()
SOURCES = ["none", "signals", "online", "self", "self_same", "on_policy", "loopholing"]


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with FakeGpu() as entered:
        yield entered


class Rows:
    """Examples of `length` tokens, an eighth of it prompt, with random signals."""

    def __init__(self, length: int) -> None:
        self.length = length

    def row(self, index: int) -> TrainingRow:
        ids = np.random.default_rng(index).integers(1, 1000, self.length)
        labels = np.where(np.arange(self.length) >= self.length // 8, ids, -100)
        masked, p = mask_example(labels >= 0, str(index), 0, NOISE)
        signals = ReferenceSignals.from_logits(torch.randn(int(masked.sum()), 50), k=4)
        return TrainingRow(index, str(index), 0, ids, labels, masked, p, signals=signals)


def train_on(
    gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
    family: str = "sdar",
    source: str = "none",
    attention: str = "sdpa",
    low: str = "autocast",
    length: int = 24,
    **residual: Any,
) -> list[dict[str, float]]:
    """One step of two rows. Fails unless autocast is on where it should be."""
    dtype = torch.bfloat16 if low == "parameters" else torch.float32
    options = {"layers": 1, "attention": attention, "loophole": source == "loopholing"}
    model = fake_model(gpu, family, dtype, **options).requires_grad_(True)  # type: ignore[arg-type]
    reference = fake_model(gpu, family) if source == "online" else None
    seen, logged = [], []
    hidden = type(model).hidden

    def watched(self: Any, *inputs: Any, **options: Any) -> Any:
        if self is model:
            seen.append(torch.is_autocast_enabled("cuda"))
        return hidden(self, *inputs, **options)

    def backward(self: Any, loss: torch.Tensor) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(type(model), "hidden", watched)
    monkeypatch.setattr(DataParallel, "backward", backward)
    monkeypatch.setattr(DataParallel, "full_weights", lambda self: {})
    settings = TrainSettings(
        steps=1, batch_size=2, log_every=1, dtype="bfloat16" if low == "autocast" else "float32",
        activation_checkpointing=source == "none", pack_length=None if attention == "flash" else 2 * length,
    )  # fmt: skip
    chosen = ResidualSettings(source=source, **residual)  # type: ignore[arg-type]
    callbacks = Callbacks(logged.append, lambda step, save: None)
    rule = SignalRule(top_k=4)
    more: Any = {"reference": reference, "signal_rule": rule, "noise": NOISE}
    train(model, Rows(length), settings, chosen, 4, callbacks, device=torch.device("cuda"), **more)
    assert seen and set(seen) == {low == "autocast"}
    return logged


@pytest.mark.parametrize("low", ["autocast", "parameters"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_step_of_each_source(source: str, low: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    family = "llada" if source in ("self_same", "on_policy") else "sdar"
    [line] = train_on(gpu, monkeypatch, family, source, low=low)
    assert line["step"] == 1


@pytest.mark.parametrize("alpha", ["learned", "uniform", "top1", "confidence"])
def test_a_step_of_each_kind_of_alpha(alpha: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in ("signals", "self"):
        train_on(gpu, monkeypatch, source=source, alpha=alpha)


@pytest.mark.parametrize(("family", "attention"), [("sdar", "flex"), ("llada", "flex"), ("llada", "flash")])
def test_attention_gets_one_dtype(family: str, attention: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """D2: under autocast the rotation makes queries and keys fp32, and values are bf16."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_stub())
    monkeypatch.setattr(backends, "_flex", lambda compiled: flex_stub)
    train_on(gpu, monkeypatch, family, attention=attention)


def flex_stub(query: Any, key: Any, value: Any, *, block_mask: Any, scale: float, enable_gqa: bool) -> Any:
    from torch.nn.attention.flex_attention import _validate_device, _validate_sdpa_input

    _validate_sdpa_input(query, key, value, allow_lowp_kv=False)
    _validate_device(query, key, value)
    return torch.empty_like(query)


def test_long_rows_wait_a_few_times(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """D10: sdpa's tiles of queries are planned once for all layers, not in each layer for each tile."""
    waits = []
    for length in (600, 1200):
        gpu.syncs.clear()
        train_on(gpu, monkeypatch, length=length)
        waits.append(len(gpu.syncs))
    assert waits[0] == waits[1] < 30, waits


def test_own_gradients(gpu: FakeGpu) -> None:
    """The backward passes of our own functions, by direct calls; autograd's own are PyTorch's."""
    table = torch.empty(VOCAB, 64, device="cuda", dtype=torch.bfloat16)
    ids, at = torch.zeros(10, dtype=torch.long, device="cuda"), torch.arange(4, device="cuda")
    alpha, tail = torch.rand(4, device="cuda"), torch.rand(4, device="cuda")
    kept, weights = torch.zeros(4, 3, dtype=torch.long, device="cuda"), torch.rand(4, 3, device="cuda")
    for needs_alpha in (True, False):
        ctx = context([True, False, False, needs_alpha, False, False, False])
        function = residual_embedding._ResidualEmbedding
        out = function.forward(ctx, table, ids, at, alpha, kept, weights, tail)
        assert out.dtype == table.dtype and out.shape == (10, 64)
        grads = function.backward(ctx, torch.empty_like(out))
        assert grads[0].shape == table.shape and grads[0].dtype == table.dtype
        assert (grads[3] is not None) == needs_alpha
    hidden, labels = torch.empty(9, 64, device="cuda"), torch.zeros(9, dtype=torch.long, device="cuda")
    for teacher in ((None, None), (torch.empty(9, 32, device="cuda"), table[:, :32])):
        ctx = context([True, True])
        loss, losses = fused_loss._WeightedCrossEntropy.forward(
            ctx, hidden, table.float(), labels, torch.ones(9, device="cuda"), 4, torch.bfloat16, *teacher
        )
        grads = fused_loss._WeightedCrossEntropy.backward(ctx, torch.empty_like(loss), torch.empty_like(losses))
        assert grads[0].shape == hidden.shape and grads[1].shape == table.shape


def context(needs: list[bool]) -> Any:
    saved = SimpleNamespace(needs_input_grad=needs, mark_non_differentiable=lambda *_: None)
    saved.save_for_backward = lambda *tensors: setattr(saved, "saved_tensors", tensors)
    return saved


@pytest.mark.parametrize("mass", [None, 0.9])
def test_encoding_of_signals(mass: float | None, gpu: FakeGpu) -> None:
    """One wait for a batch of positions: whether the predictions are finite."""
    hidden = torch.empty(600, 64, device="cuda", dtype=torch.bfloat16)
    head = torch.empty(VOCAB, 64, device="cuda", dtype=torch.bfloat16)
    for temperatures in ({}, {"alpha_temperature": 1.3}):
        gpu.syncs.clear()
        found = ReferenceSignals.from_hidden(hidden, head, 32, mass, **temperatures)
        assert found.topk_ids.shape == (600, 32) and found.entropy.device.type == "cuda"
        assert gpu.syncs == ["item"]
        assert replace(found, entropy=found.entropy).to("cpu").topk_ids.device.type == "cpu"
