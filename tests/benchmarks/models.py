"""Models with random weights, for benchmarks."""

from __future__ import annotations

from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.config import ModelConfig
from rcd_core.families.loading import new_model

DEMO = ModelConfig(
    family="sdar", hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=192, max_positions=2048
)
VOCAB = 151_936


def random_model(config: ModelConfig, vocab: int) -> DiffusionModel:
    info = CheckpointInfo(mask_token_id=vocab - 1, eos_token_ids=(0,), pad_token_id=0, block_length=4)
    return new_model(config, vocab_size=vocab, info=info, seed=0).eval()
