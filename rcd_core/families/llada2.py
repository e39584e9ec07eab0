"""LLaDA2.0 (mini, flash): SDAR's way of decoding over a mixture of experts with router groups, which transformers'
Glm4Moe layers compute: sigmoid router with a bias for the choice only, shared experts, rotation of half a head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rcd_core.families.base import CheckpointInfo, read_ids
from rcd_core.families.config_json import require_fields, require_values
from rcd_core.families.files import CheckpointFiles
from rcd_core.families.sdar import SDARModel
from rcd_core.families.weights import StoredTensor

MASK_TOKEN_ID, EOS_TOKEN_ID = 156895, 156892
BLOCK_LENGTH = 32
# config.json -> Glm4MoeConfig, for fields of different names.
_RENAMED = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "n_group"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "first_k_dense_replace", "num_experts_per_tok"),
    *("topk_group", "routed_scaling_factor", "rms_norm_eps"),
)
_FIXED: dict[str, Any] = {
    "use_bias": False, "use_qkv_bias": False, "use_qk_norm": True, "hidden_act": "silu", "rope_scaling": None,
}  # fmt: skip
_NAMES = {
    "attention.dense": "self_attn.o_proj",
    "attention.query_layernorm": "self_attn.q_norm",
    "attention.key_layernorm": "self_attn.k_norm",
    "mlp.gate.expert_bias": "mlp.gate.e_score_correction_bias",
    "model.word_embeddings": "model.embed_tokens",
}


class LLaDA2Model(SDARModel):
    model_types = ("llada2_moe", "llada21_moe", "llada2_moe_veomni")
    transformers_name = "Glm4Moe"
    has_experts = True

    def official_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        c = self.config
        config = {name: getattr(c, name) for name in _SAME}
        config |= {name: getattr(c, other) for name, other in _RENAMED.items()}
        config |= {
            "architectures": ["LLaDA2MoeModelLM"],
            "block_size": self.info.block_length,
            "max_position_embeddings": c.max_position_embeddings,
            "model_type": "llada2_moe",
            "partial_rotary_factor": c.rope_parameters["partial_rotary_factor"],
            "rope_theta": c.rope_parameters["rope_theta"],
            "tie_word_embeddings": c.tie_word_embeddings,
        }
        weights: dict[str, Tensor] = {}
        for name, tensor in self.stored_weights().items():
            if match := re.fullmatch(r"(.+)\.self_attn\.(q|k|v)_proj\.weight", name):
                parts = [self.backbone.get_parameter(f"{match[1]}.self_attn.{k}_proj.weight") for k in "qkv"]
                if match[2] == "q":
                    weights[f"{match[1]}.attention.query_key_value.weight"] = torch.cat(
                        [part.detach() for part in parts]
                    )
                continue
            for ours, theirs in ((v, k) for k, v in _NAMES.items()):
                name = name.replace(ours, theirs)
            weights[name] = tensor
        return self.common_fields() | _FIXED | config, weights

    @classmethod
    def read_config(cls, config: dict[str, Any], where: Path, has_head: bool) -> Any:
        require_fields(config, (*_SAME, "num_experts", "rope_theta"), where)
        require_values(config, _FIXED, where)
        tied = config.get("tie_word_embeddings")
        return cls.config_class()(
            **{name: config[name] for name in _SAME},
            n_routed_experts=config["num_experts"],
            n_shared_experts=config.get("num_shared_experts") or 0,
            norm_topk_prob=True,  # always, as in the authors' code
            use_qk_norm=True,
            attention_bias=False,
            num_mtp_layers=0,
            max_position_embeddings=config.get("max_position_embeddings", 16384),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": config["rope_theta"],
                "partial_rotary_factor": config.get("partial_rotary_factor", 1.0),
            },
            tie_word_embeddings=not has_head if tied is None else tied,
        )

    @classmethod
    def read_info(cls, files: CheckpointFiles) -> CheckpointInfo:
        return read_ids(files, MASK_TOKEN_ID, (EOS_TOKEN_ID,), ("block_size", "block_length"), BLOCK_LENGTH)

    @classmethod
    def backbone_name(cls, name: str) -> str:
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        return name

    @classmethod
    def expand(cls, entry: StoredTensor, config: dict[str, Any]) -> Iterator[tuple[str, StoredTensor]]:
        """query_key_value holds the rows of queries, keys and values, in this order."""
        match = re.fullmatch(r"(.+)\.attention\.query_key_value\.weight", entry.name)
        if match is None:
            yield from super().expand(entry, config)
            return
        width, keys = config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
        ends = (config["num_attention_heads"] * width, keys, keys)
        first = 0
        for kind, rows in zip("qkv", ends, strict=True):
            part = replace(entry, shape=(rows, entry.shape[1]), pick=(slice(first, first + rows),))
            yield f"{match[1]}.self_attn.{kind}_proj.weight", part
            first += rows
