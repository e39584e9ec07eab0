"""LLaDA-MoE (LLaDA-MoE-7B-A1B): LLaDA's decoding over Qwen3-MoE layers without a causal mask.

Its router is a softmax over all experts without renormalisation. Of the options in the authors' code, dense layers
load. Shared experts, expert biases, clipped projections and partial rotation, which transformers' class does not have,
are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rcd_core.families.base import CheckpointInfo, read_ids
from rcd_core.families.config_json import read_rope, require_fields, require_values
from rcd_core.families.files import CheckpointFiles
from rcd_core.families.llada import BLOCK_LENGTH, LLaDAModel

MASK_TOKEN_ID, EOS_TOKEN_ID = 156895, 156892
_REQUIRED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts", "num_experts_per_tok"),
    *("expert_intermediate_size", "rope_theta", "rms_norm_eps"),
)
# The network that transformers' class computes. Fields that the authors' code reads and ignores are not listed.
_FIXED: dict[str, Any] = {
    "attention_bias": False, "clip_qkv": None, "moe_router_enable_expert_bias": False, "partial_rotary_factor": 1.0,
    "qk_layernorm": True, "shared_expert_intermediate_size": None, "hidden_act": "silu",
}  # fmt: skip


class LLaDAMoEModel(LLaDAModel):
    model_types = ("llada", "lladamoe", "llada_moe")
    transformers_name = "Qwen3Moe"
    has_experts = True

    def official_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        c = self.config
        dense = set(c.mlp_only_layers)
        config = {
            "architectures": ["LLaDAMoEModelLM"],
            "block_length": self.info.block_length,
            "dense_intermediate_size": c.intermediate_size,
            "expert_intermediate_size": c.moe_intermediate_size,
            "max_position_embeddings": c.max_position_embeddings,
            "model_type": "llada",
            "moe_layer_freq": [int(layer not in dense) for layer in range(c.num_hidden_layers)],
            "rope_theta": c.rope_parameters["rope_theta"],
            "tie_word_embeddings": c.tie_word_embeddings,
            **{
                name: getattr(c, name)
                for name in ("hidden_size", "num_attention_heads", "num_experts", "num_experts_per_tok")
            },
            "num_hidden_layers": c.num_hidden_layers,
            "num_key_value_heads": c.num_key_value_heads,
        }
        return self.common_fields() | _FIXED | config, self.stored_weights()

    @classmethod
    def read_config(cls, config: dict[str, Any], where: Path, has_head: bool) -> Any:
        require_fields(config, _REQUIRED, where)
        require_values(config, _FIXED, where)
        layers, tied = config["num_hidden_layers"], config.get("tie_word_embeddings")
        frequencies = config.get("moe_layer_freq")
        freq = [frequencies or 1] * layers if not isinstance(frequencies, list) else frequencies
        return cls.config_class()(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config.get("dense_intermediate_size") or config["expert_intermediate_size"],
            moe_intermediate_size=config["expert_intermediate_size"],
            num_hidden_layers=layers,
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config["hidden_size"] // config["num_attention_heads"],
            num_experts=config["num_experts"],
            num_experts_per_tok=config["num_experts_per_tok"],
            norm_topk_prob=False,  # whatever the file says, as in the authors' code
            mlp_only_layers=[layer for layer, experts in enumerate(freq) if not experts],
            max_position_embeddings=config.get("max_position_embeddings", 4096),
            rms_norm_eps=config["rms_norm_eps"],
            rope_parameters=read_rope(config, where),
            tie_word_embeddings=not has_head if tied is None else tied,
        )

    @classmethod
    def read_info(cls, files: CheckpointFiles) -> CheckpointInfo:
        return read_ids(files, MASK_TOKEN_ID, (EOS_TOKEN_ID,), ("block_length",), BLOCK_LENGTH)

    @classmethod
    def backbone_name(cls, name: str) -> str:
        return name
