"""Models for the fake GPU: they have the official vocabulary, because fake weights take no memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from rcd_core.alpha import LearnedAlpha
from rcd_core.attention import backend_key
from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.config import ModelConfig
from rcd_core.families.loading import family_of, new_model
from rcd_core.loopholing import Loophole
from tests.rcd_core.fake_gpu.device import FakeGpu

VOCAB = 151_936
INFO = CheckpointInfo(mask_token_id=VOCAB - 1, eos_token_ids=(0,), pad_token_id=0, block_length=4)
GOLDEN = Path(__file__).parents[2] / "golden"


def fake_model(
    gpu: FakeGpu,
    family: str = "sdar",
    dtype: torch.dtype = torch.bfloat16,
    layers: int = 2,
    attention: str = "sdpa",
    loophole: bool = False,
) -> DiffusionModel:
    """4 query and 2 key heads of 64, with a learned alpha."""
    config: Any = ModelConfig(
        family=family,  # type: ignore[arg-type]
        hidden_size=256,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=512,
        max_positions=4096,
    )
    with _disable_current_modes(), torch.device("meta"):
        model = new_model(config, vocab_size=VOCAB, info=INFO, seed=0).eval()
        model.learned_alpha = LearnedAlpha()
        model.loophole = Loophole(256) if loophole else None
    model.config._attn_implementation = backend_key(attention, "cuda")
    return gpu.model(model, dtype)  # type: ignore[no-any-return]


def fake_checkpoint(gpu: FakeGpu, name: str, dtype: torch.dtype = torch.bfloat16) -> DiffusionModel:
    """The network of a checkpoint below tests/golden, with widths that GPUs' grouped products take."""
    config = json.loads((GOLDEN / name / "config.json").read_text()) | {"vocab_size": VOCAB}
    if "expert_intermediate_size" in config:
        config["expert_intermediate_size"] = 16
    family = family_of(config, GOLDEN / name)
    with _disable_current_modes(), torch.device("meta"):
        model = family(family.backbone_class()(family.read_config(config, GOLDEN / name, True)), INFO).eval()
    model.config._attn_implementation = backend_key("sdpa", "cuda")
    return gpu.model(model, dtype)  # type: ignore[no-any-return]
