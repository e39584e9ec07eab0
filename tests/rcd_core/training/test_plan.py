"""The plan of a training run against published sizes, sums written out, and measured peaks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rcd_core.errors import UserError
from rcd_core.families.base import CheckpointInfo
from rcd_core.families.config import ModelConfig
from rcd_core.families.loading import load_model, new_model
from rcd_core.training.costs import training_cost
from rcd_core.training.lora import add_adapters
from rcd_core.training.meter import Meter
from rcd_core.training.plan import (
    MEMORY,
    Memory,
    ModelShape,
    StepShape,
    adapter_parameters,
    fits,
    layer_activations,
    memory,
    step_shape,
)
from rcd_core.training.settings import LoraSettings, TrainSettings
from tests.rcd_core.training import peak_memory
from tests.rcd_core.training.helpers import GOLDEN

SDAR_8B = ModelShape(
    family="sdar",
    hidden_size=4096,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=12288,
    vocab_size=151936,
    tie_embeddings=False,
)
LLADA_8B = replace(
    SDAR_8B, family="llada", num_layers=32, num_kv_heads=32, head_dim=128, vocab_size=126464, intermediate_size=12288
)
STEP = StepShape(tokens=16384, masked=4096, accumulated=True, signal_k=32)


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"steps": 10, "batch_size": 96, "dtype": "bfloat16", **changes})


def zero(stage: int, **more: Any) -> TrainSettings:
    return settings(strategy="deepspeed", deepspeed={"zero_optimization": {"stage": stage, **more}})


def test_parameters_are_those_of_the_published_checkpoints() -> None:
    """From the sizes of their files in bf16 (SDAR), and LLaDA's own count."""
    assert SDAR_8B.parameters * 2 == 16_381_470_720
    sdar_4b = replace(SDAR_8B, hidden_size=2560, intermediate_size=9728)
    assert sdar_4b.parameters * 2 == 8_822_848_512
    assert LLADA_8B.parameters == 8_015_581_184


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_parameters_are_those_of_a_new_model(family: Any, tied: bool) -> None:
    config = ModelConfig(
        family=family,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=48,
        tie_embeddings=tied,
    )
    info = CheckpointInfo(mask_token_id=1, eos_token_ids=(0,), pad_token_id=0, block_length=4)
    model = new_model(config, vocab_size=64, info=info, seed=0)
    shape = ModelShape.of(config, 64)
    assert shape.parameters == model.num_parameters()
    assert shape == ModelShape.of_backbone(family, model.config)


@pytest.mark.parametrize(
    ("name", "met"),
    [
        ("sdar_moe/sdar_moe_tiny", 4 / 16),
        ("llada_moe/llada_moe_tiny", 4 / 16),
        ("llada2/llada2_tiny", 5 / 17),
        ("dream/dream_tiny", 1),
        ("fastdllm_v2/fastdllm_v2_tiny", 1),
    ],
)
def test_parameters_of_other_networks(name: str, met: float) -> None:
    """met: the share of a mixture's columns that a token meets."""
    model = load_model(GOLDEN / name)
    shape = ModelShape.of_backbone(model.family, model.config)  # type: ignore[arg-type]
    assert shape.parameters == model.num_parameters()
    mixtures = sum(p.numel() for n, p in model.named_parameters() if "experts" in n)
    assert shape.all_layers - shape.active_layers == pytest.approx((1 - met) * mixtures)
    meter = Meter(model, torch.device("cpu"), 0)
    norm = model.config.hidden_size  # the last one, which the meter counts with the layers
    assert meter.layer_parameters == shape.active_layers + norm


@pytest.mark.parametrize("field", ["block_size", "block_length"])
@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama"])
def test_parameters_of_a2d_models(name: str, field: str, tmp_path: Path) -> None:
    """Head norms belong to the layers, not to the way of decoding."""
    source = GOLDEN / "a2d" / f"{name}_tiny"
    config = json.loads((source / "config.json").read_text()) | {"mask_token_id": 255, field: 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    model = load_model(tmp_path)
    shape = ModelShape.of_backbone(model.family, model.config)  # type: ignore[arg-type]
    assert shape.parameters == model.num_parameters()


def test_memory_that_strategies_save() -> None:
    """16 bytes per parameter on one GPU; sharding divides them, each ZeRO stage needs less, offload moves them."""
    total = SDAR_8B.parameters
    plain = memory(SDAR_8B, settings(dtype="float32"), STEP, 1)
    assert plain.weights + plain.gradients + plain.optimizer == 16 * total
    muon = memory(SDAR_8B, settings(dtype="float32", optimizer="muon"), STEP, 1)
    assert plain.optimizer - muon.optimizer == 4 * SDAR_8B.all_layers
    sharded = [memory(SDAR_8B, settings(strategy="fsdp2"), STEP, w) for w in (1, 8)]
    constant = sharded[0].peak - sharded[1].peak
    assert constant == pytest.approx(16 * total * 7 / 8)
    peaks = [memory(SDAR_8B, zero(stage), STEP, 8).peak for stage in (1, 2, 3)]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3
    offloaded = memory(SDAR_8B, settings(strategy="fsdp2", cpu_offload=True), STEP, 8)
    assert offloaded.host == 16 * total / 8 and offloaded.peak < sharded[1].peak
    out = {"offload_optimizer": {"device": "cpu"}}
    assert memory(SDAR_8B, zero(2, **out), STEP, 8).host == 12 * total / 8
    assert not fits(plain, "H100") and fits(sharded[1], "H200") == (sharded[1].peak <= 0.9 * MEMORY["H200"])


def test_activation_checkpointing_keeps_one_layer_and_the_stream() -> None:
    full = memory(SDAR_8B, settings(strategy="fsdp2"), STEP, 8).activations
    less = memory(SDAR_8B, settings(strategy="fsdp2", activation_checkpointing=True), STEP, 8).activations
    layer, stream = STEP.tokens * layer_activations(SDAR_8B, 2, False), STEP.tokens * 2 * 4096
    assert full - less == pytest.approx(35 * layer - 36 * stream)
    some = memory(SDAR_8B, settings(strategy="fsdp2", activation_checkpointing="selective"), STEP, 8).activations
    # q and the attention's result, k and v, o and down, gate and up; one logarithm per head.
    kept = 2 * (2 * 4096 + 2 * 1024 + 2 * 4096 + 2 * 12288) + 4 * 32
    assert some - less == pytest.approx(36 * STEP.tokens * kept) and some < 0.75 * full


def test_the_peak_is_the_larger_of_two_moments() -> None:
    parts = {"weights": 1.0, "gradients": 10.0, "optimizer": 2.0, "activations": 6.0, "loss": 1.0, "signals": 1.0}
    assert Memory(**parts, accumulated=False).peak == 3 + 10
    assert Memory(**parts | {"activations": 20.0}, accumulated=False).peak == 3 + 22
    assert Memory(**parts, accumulated=True).peak == 3 + 10 + 8


def test_a_step_counts_what_enters_the_layers() -> None:
    s = settings(micro_batch_size=1, pack_length=8192)
    step = step_shape(SDAR_8B, s, 8192, workers=8, labelled_share=0.5, signal_k=32)
    assert step == StepShape(tokens=2 * 8192, masked=2048, accumulated=True, signal_k=32)
    assert step_shape(LLADA_8B, s, 8192, 8, 0.5, 32).tokens == 8192
    whole = step_shape(LLADA_8B, settings(batch_size=8), 2048, 8, 1.0, 0)
    assert whole.tokens == 2048 and not whole.accumulated


def test_flops_are_those_of_the_meter_and_hours_follow() -> None:
    cost = training_cost(SDAR_8B, rows=96, tokens_per_row=1000.0, labelled_share=0.5, gpus=8, device="H100", mfu=0.4)
    layers, head = 36 * SDAR_8B.layer_parameters, 151936 * 4096
    assert cost.flops == pytest.approx(6 * (layers * 192_000 + head * 24_000))
    assert cost.hours == pytest.approx(cost.flops / (8 * 989e12 * 0.4) / 3600)
    online = training_cost(SDAR_8B, 96, 1000.0, 0.5, 8, "H100", 0.4, extra_forwards=1.5)
    assert online.flops == cost.flops and online.hours == pytest.approx(1.5 * cost.hours)
    with pytest.raises(UserError, match="device 'TPU'"):
        training_cost(SDAR_8B, 96, 1000.0, 0.5, 8, "TPU", 0.4)


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        pytest.param(1, {}, marks=pytest.mark.drill),
        pytest.param(1, {"activation_checkpointing": True}, marks=pytest.mark.drill),
        pytest.param(1, {"micro_batch_size": 1}, marks=pytest.mark.drill),
        pytest.param(1, {"dtype": "bfloat16"}, marks=pytest.mark.drill),
        pytest.param(2, {}, marks=pytest.mark.drill),
        pytest.param(2, {"strategy": "fsdp2"}, marks=pytest.mark.drill),
    ],
)
def test_the_prediction_is_close_to_a_measured_peak(world: int, changes: dict[str, Any]) -> None:
    """Resident memory of rank 0 with 36 million parameters on a CPU, with what the allocator keeps."""
    s = peak_memory.settings(**changes)
    measured, predicted = peak_memory.measured(s, world), peak_memory.predicted(s, world).peak
    print(f"{world} x {changes}: measured {measured >> 20} MiB, predicted {predicted / 2**20:.0f} MiB")
    assert 0.85 * measured < predicted < 1.1 * measured


def test_adapters_are_counted_as_they_are_made() -> None:
    """Gradients and optimizer of what is trained; the plan against the parameters that PEFT adds."""
    pytest.importorskip("peft")
    model = load_model(GOLDEN / "sdar_tiny")
    lora = LoraSettings(rank=3, modules=("q_proj", "k_proj", "o_proj", "down_proj"))
    add_adapters(model, lora)
    shape = ModelShape.of_backbone("sdar", load_model(GOLDEN / "sdar_tiny").config)
    assert adapter_parameters(shape, lora) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    step = StepShape(tokens=64, masked=16, accumulated=False, signal_k=0)
    for strategy in ("ddp", "fsdp2"):
        whole = TrainSettings(steps=1, batch_size=4, strategy=strategy)
        few = replace(whole, lora=lora)
        assert memory(shape, few, step, 2).optimizer < 0.2 * memory(shape, whole, step, 2).optimizer
        assert memory(shape, few, step, 2).weights <= memory(shape, whole, step, 2).weights
