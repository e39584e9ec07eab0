"""LLaDA-MoE (LLaDA-MoE-7B-A1B): LLaDA's decoding over Qwen3-MoE layers without a causal mask.

Its router is a softmax over all experts without renormalisation. llada_moe_layers.py has the options of the authors'
code that transformers' class lacks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rcd_core.families.base import CheckpointInfo, read_ids
from rcd_core.families.config import ModelConfig
from rcd_core.families.config_json import read_rope, require_fields, require_values
from rcd_core.families.files import CheckpointFiles
from rcd_core.families.llada import BLOCK_LENGTH, LLaDAModel

MASK_TOKEN_ID, EOS_TOKEN_ID = 156895, 156892
_REQUIRED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts", "num_experts_per_tok"),
    *("expert_intermediate_size", "rope_theta", "rms_norm_eps"),
)
# The only supported values. Fields that the authors' code reads and ignores are not listed.
_FIXED: dict[str, Any] = {"attention_bias": False, "qk_layernorm": True, "hidden_act": "silu"}
_OPTIONS = ("clip_qkv", "moe_router_enable_expert_bias", "shared_expert_intermediate_size")
_NAMES = {".expert_bias": ".gate.expert_bias", ".shared_expert.": ".mlp.shared_expert."}  # the authors', ours


class LLaDAMoEModel(LLaDAModel):
    model_types = ("llada", "lladamoe", "llada_moe")
    transformers_name = "Qwen3Moe"
    has_experts = True

    @classmethod
    def backbone_class(cls) -> Any:
        from rcd_core.families.llada_moe_layers import LLaDAMoEForCausalLM

        return LLaDAMoEForCausalLM

    @classmethod
    def new_config(cls, sizes: ModelConfig, vocab_size: int) -> Any:
        config = super().new_config(sizes, vocab_size)
        for option in _OPTIONS:
            setattr(config, option, None)
        return config

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
            "partial_rotary_factor": c.rope_parameters.get("partial_rotary_factor", 1.0),
            **{option: getattr(c, option) for option in _OPTIONS},
        }
        weights = self.stored_weights()
        for theirs, ours in _NAMES.items():
            weights = {name.replace(ours, theirs): tensor for name, tensor in weights.items()}
        return self.common_fields() | _FIXED | config, weights

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
            rope_parameters=read_rope(config, where) | _partial(config),
            tie_word_embeddings=not has_head if tied is None else tied,
            **{option: config.get(option) for option in _OPTIONS},
        )

    @classmethod
    def read_info(cls, files: CheckpointFiles) -> CheckpointInfo:
        return read_ids(files, MASK_TOKEN_ID, (EOS_TOKEN_ID,), ("block_length",), BLOCK_LENGTH)

    @classmethod
    def backbone_name(cls, name: str) -> str:
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        return name


def _partial(config: dict[str, Any]) -> dict[str, float]:
    factor = config.get("partial_rotary_factor") or 1.0
    return {} if factor == 1.0 else {"partial_rotary_factor": factor}
