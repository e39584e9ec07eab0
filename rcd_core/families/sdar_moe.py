"""SDAR-MoE (SDAR-30B-A3B): SDAR over Qwen3-MoE. Plain Qwen3-MoE checkpoints load as starting weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rcd_core.families.config_json import read_rope, read_sizes, require_fields
from rcd_core.families.sdar import SDARModel, refuse_windows

_EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
# Fields with the defaults of Qwen3MoeConfig.
_OPTIONAL: dict[str, Any] = {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []}


class SDARMoEModel(SDARModel):
    model_types = ("sdar_moe", "qwen3_moe")
    transformers_name = "Qwen3Moe"
    has_experts = True

    def official_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config, weights = super().official_files()
        fields = (*_EXPERT_FIELDS, *_OPTIONAL)
        experts = {name: getattr(self.config, name) for name in fields}
        return config | experts | {"architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe"}, weights

    @classmethod
    def read_config(cls, config: dict[str, Any], where: Path, has_head: bool) -> Any:
        require_fields(config, _EXPERT_FIELDS, where)
        refuse_windows(config, where)
        return cls.config_class()(
            **read_sizes(config, where, has_head, max_positions=32768),
            **{name: config[name] for name in _EXPERT_FIELDS},
            **{name: default if config.get(name) is None else config[name] for name, default in _OPTIONAL.items()},
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            initializer_range=config.get("initializer_range", 0.02),
            rope_parameters=read_rope(config, where),
        )
