"""SDAR: Qwen3 with block diffusion (semantics.md 1). Plain Qwen3 checkpoints load as a start for new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from rcd_core.errors import UserError
from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.config import ModelConfig
from rcd_core.families.files import CheckpointFiles, require_fields
from rcd_core.families.rope import read_rope, write_rope

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
            "attention_dropout": 0.0,
            "block_size": self.info.block_length,
            "head_dim": c.head_dim,
            "hidden_act": c.hidden_act,
            "hidden_size": c.hidden_size,
            "initializer_range": c.initializer_range,
            "intermediate_size": c.intermediate_size,
            "max_position_embeddings": c.max_position_embeddings,
            "max_window_layers": c.num_hidden_layers,
            "num_attention_heads": c.num_attention_heads,
            "num_hidden_layers": c.num_hidden_layers,
            "num_key_value_heads": c.num_key_value_heads,
            "rms_norm_eps": c.rms_norm_eps,
            "sliding_window": None,
            "tie_word_embeddings": c.tie_word_embeddings,
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": c.vocab_size,
            **write_rope(c.rope_parameters),
            **self.special_ids(),
        }
        weights = dict(self.backbone.state_dict())
        if c.tie_word_embeddings:
            del weights["lm_head.weight"]
        return config, weights


def backbone_config(config: dict[str, Any], where: Path, has_head: bool) -> Qwen3Config:
    """Qwen3Config of an SDAR or Qwen3 config.json. has_head: whether the files hold a head, for a silent config."""
    require_fields(
        config, ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), where
    )
    windowed = config.get("use_sliding_window") and config.get("sliding_window") is not None
    if windowed or set(config.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(
            f"{where}: config.json asks for sliding-window attention (use_sliding_window, layer_types), which block "
            "diffusion does not have; set use_sliding_window to false and drop layer_types to use full attention"
        )
    heads, tied = config["num_attention_heads"], config.get("tie_word_embeddings")
    return Qwen3Config(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or 128,  # the authors' class default, whatever the width
        hidden_act=config.get("hidden_act", "silu"),
        max_position_embeddings=config.get("max_position_embeddings", 32768),
        initializer_range=config.get("initializer_range", 0.02),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=not has_head if tied is None else tied,
        rope_parameters=read_rope(config, where),
        attention_bias=config.get("attention_bias", False),
    )


def build_backbone(config: Qwen3Config) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(config)


def checkpoint_info(files: CheckpointFiles) -> CheckpointInfo:
    eos = files.eos_token_ids(EOS_TOKEN_IDS)
    return CheckpointInfo(
        mask_token_id=files.mask_token_id(MASK_TOKEN_ID),
        eos_token_ids=eos,
        pad_token_id=files.pad_token_id((eos or EOS_TOKEN_IDS)[-1]),
        block_length=files.block_length(("block_size", "block_length"), BLOCK_LENGTH),
        rcd=files.rcd(),
    )


def backbone_name(name: str) -> str:
    return name  # SDAR kept Qwen3's names


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
