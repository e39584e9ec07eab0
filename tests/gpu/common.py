"""What the parts share: sizes, random models, time limits, and what the hardware could do at best."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rcd_core import DecodeSettings
from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.config import ModelConfig
from rcd_core.families.loading import new_model
from rcd_core.training.meter import peak_flops

# hidden, layers, heads, key heads, head width, intermediate: SDAR's are those of Qwen3.
SHAPES = {
    "tiny": (64, 2, 4, 2, 16, 128),
    "small": (512, 4, 8, 4, 128, 1536),
    "1.7b": (2048, 28, 16, 8, 128, 6144),
    "4b": (2560, 36, 32, 8, 128, 9728),
    "8b": (4096, 36, 32, 8, 128, 12288),
}
BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12, "B200": 8e12, "L40S": 0.864e12, "L4": 0.3e12}  # bytes/s


@dataclass
class Run:
    """device, and the part's end by time.perf_counter(). rehearse: tiny shapes on a CPU, to test this script."""

    device: torch.device
    rehearse: bool
    end: float

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    @property
    def vocab(self) -> int:
        return 512 if self.rehearse else 151_936

    def shape(self, name: str) -> str:
        return "tiny" if self.rehearse else name

    def wait(self) -> float:
        """The time, when the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def model(
        self, shape: str, dtype: torch.dtype = torch.bfloat16, block_length: int = 32, seed: int = 0
    ) -> DiffusionModel:
        """Random weights of a shape, made on the device. std 0.02, so that logits are moderate at every width."""
        hidden, layers, heads, groups, width, intermediate = SHAPES[self.shape(shape)]
        config = ModelConfig(
            family="sdar",
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=groups,
            head_dim=width,
            intermediate_size=intermediate,
            max_positions=32768,
            rope_theta=1e6,
        )
        info = CheckpointInfo(self.vocab - 1, (0,), 0, block_length)
        with torch.device("meta"):
            model = new_model(config, vocab_size=self.vocab, info=info, seed=0)
        model = model.to(dtype).to_empty(device=self.device).eval().requires_grad_(False)
        body = model.backbone.model
        body.rotary_emb = type(body.rotary_emb)(model.config).to(self.device)
        generator = torch.Generator(self.device).manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0)
        return model

    def release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(1, vocab - 2, length - i % 7).tolist() for i in range(count)]


def settings(block_length: int, new_tokens: int, **more: Any) -> DecodeSettings:
    """A static schedule, so that every model makes the same passes: half of a block of 4 in a pass, an eighth of a
    longer one."""
    steps = 2 if block_length <= 4 else 8
    return DecodeSettings(
        block_length=block_length,
        denoising_steps=min(steps, block_length),
        policy="low_confidence_static",
        max_new_tokens=new_tokens,
        stop_token_ids=(),
        **more,
    )


def of_device(device: torch.device, table: dict[str, float]) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in table.items() if part in name), None)


def bounds(model: DiffusionModel, batch: int, tokens: int, masked: int, context: int) -> dict[str, float | None]:
    """Passes per second that the hardware allows at most. bandwidth: every weight of layers and head is read once, and
    the keys and values of `context` positions of all requests. flops: 2 for each weight of the layers and token, and of
    the head and masked position, and those of attention. None: unknown hardware."""
    c = model.config
    head = model.lm_head_weight.numel()
    layers = model.num_parameters() - head - model.embedding.weight.numel()
    read = (layers + head) * model.dtype.itemsize
    read += context * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize
    attention = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * context * tokens / batch
    flops = 2 * (layers * tokens + head * masked) + attention
    bandwidth, peak = of_device(model.device, BANDWIDTH), peak_flops(model.device)
    return {
        "bandwidth_bound": bandwidth and bandwidth / read,
        "flops_bound": peak and peak / flops,
    }
