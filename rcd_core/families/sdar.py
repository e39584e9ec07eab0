"""SDAR: Qwen3 with block diffusion (semantics.md 1). Plain Qwen3 checkpoints load as a start for new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from rcd_core.families.base import CheckpointInfo, DiffusionModel, require_fields
from rcd_core.families.config import ModelConfig

MODEL_TYPES = ("sdar", "qwen3")
MASK_TOKEN_ID = 151669  # <|MASK|> of every published SDAR tokenizer
EOS_TOKEN_IDS = (151645, 151643)  # <|im_end|>, <|endoftext|>
BLOCK_LENGTH = 4


class SDARModel(DiffusionModel):
    family = "sdar"
    threshold_inclusive = False
    blocks_from_prompt_end = False
    default_start = "zero"

    def attention_block(self, block_length: int) -> int | None:
        return block_length

    def official_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        c = self.config
        config = {
            "architectures": ["SDARForCausalLM"],
            "model_type": "sdar",
            "attention_bias": c.attention_bias,
            "block_size": self.info.block_length,
            "eos_token_id": self.info.eos_token_ids[0]
            if len(self.info.eos_token_ids) == 1
            else list(self.info.eos_token_ids),
            "head_dim": c.head_dim,
            "hidden_act": c.hidden_act,
            "hidden_size": c.hidden_size,
            "initializer_range": c.initializer_range,
            "intermediate_size": c.intermediate_size,
            "mask_token_id": self.info.mask_token_id,
            "max_position_embeddings": c.max_position_embeddings,
            "num_attention_heads": c.num_attention_heads,
            "num_hidden_layers": c.num_hidden_layers,
            "num_key_value_heads": c.num_key_value_heads,
            "pad_token_id": self.info.pad_token_id,
            "rms_norm_eps": c.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": c.rope_parameters["rope_theta"],
            "tie_word_embeddings": c.tie_word_embeddings,
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "vocab_size": c.vocab_size,
        }
        weights = dict(self.backbone.state_dict())
        if c.tie_word_embeddings:
            del weights["lm_head.weight"]
        return config, weights


def backbone_config(config: dict[str, Any], where: Path) -> Qwen3Config:
    """Qwen3Config of an SDAR or Qwen3 config.json."""
    require_fields(
        config, ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), where
    )
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {"rope_type": "default", "rope_theta": config.get("rope_theta", 1e6)}
    return Qwen3Config(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        hidden_act=config.get("hidden_act", "silu"),
        max_position_embeddings=config.get("max_position_embeddings", 32768),
        initializer_range=config.get("initializer_range", 0.02),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        rope_parameters=rope,
        attention_bias=config.get("attention_bias", False),
    )


def build_backbone(config: Qwen3Config) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(config)


def checkpoint_info(config: dict[str, Any], generation: dict[str, Any]) -> CheckpointInfo:
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    eos_ids = EOS_TOKEN_IDS if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    pad = config.get("pad_token_id", generation.get("pad_token_id"))
    return CheckpointInfo(
        mask_token_id=config.get("mask_token_id", MASK_TOKEN_ID),
        eos_token_ids=tuple(int(e) for e in eos_ids),
        pad_token_id=int(eos_ids[-1] if pad is None else pad),
        block_length=config.get("block_size") or BLOCK_LENGTH,
        rcd=config.get("rcd") or {},
    )


def rename_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights  # SDAR kept Qwen3's names


def fresh_config(start: ModelConfig, vocab_size: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=start.hidden_size,
        intermediate_size=start.intermediate_size,
        num_hidden_layers=start.num_layers,
        num_attention_heads=start.num_heads,
        num_key_value_heads=start.num_kv_heads,
        head_dim=start.resolved_head_dim,
        max_position_embeddings=start.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": start.rope_theta},
        tie_word_embeddings=start.tie_embeddings,
    )


MODEL = SDARModel
