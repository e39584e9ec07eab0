"""dLLM's converted models (a2d-qwen3, a2d-qwen2, a2d-llama), such as Qwen3-0.6B-diffusion-bd3lm and -mdlm.

Two ways of decoding share one `model_type`. BD3LM: block-causal, with blocks counted from the prompt's end, backwards
too; in training they are counted from position 0. MDLM: the whole canvas. config.json's `block_size` (BD3LM) or
`block_length` (MDLM), which our exports contain, decides, else the model's name; without either it is BD3LM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from rcd_core.families.base import CheckpointInfo, DiffusionModel, read_ids
from rcd_core.families.config_json import read_rope, read_sizes, write_sizes
from rcd_core.families.dream import qwen2_config
from rcd_core.families.files import CheckpointFiles
from rcd_core.families.llada import LLaDAModel
from rcd_core.families.sdar import SDARModel

BLOCK_LENGTH = 32
_MASKS = {"a2d-qwen3": 151669, "a2d-qwen2": 151665}  # the first free id, where dLLM puts <|mask|>
_ARCHITECTURES = {"a2d-qwen3": "A2DQwen3", "a2d-qwen2": "A2DQwen2", "a2d-llama": "A2DLlama"}


class _A2D(DiffusionModel):
    """What both ways have in common. block_field: of config.json."""

    block_field: ClassVar[str]
    default_schedule = "linear"

    def official_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        kind = self.model_types[0]
        config = self.common_fields() | write_sizes(self.config)
        config |= {
            "architectures": [f"{_ARCHITECTURES[kind]}LMHeadModel"],
            "attention_dropout": 0.0,
            "initializer_range": self.config.initializer_range,
            "model_type": kind,
            "use_cache": True,
            self.block_field: self.info.block_length,
        }
        return config, self.stored_weights()

    @classmethod
    def matches(cls, config: dict[str, Any], has_experts: bool, name: str) -> bool:
        by_blocks = "block_size" in config or ("block_length" not in config and "mdlm" not in name.lower())
        return super().matches(config, has_experts, name) and by_blocks == (cls.block_field == "block_size")

    @classmethod
    def read_config(cls, config: dict[str, Any], where: Path, has_head: bool) -> Any:
        kind = config["model_type"]
        if kind == "a2d-qwen3":
            return SDARModel.read_config.__func__(cls, config, where, has_head)  # type: ignore[attr-defined]
        if kind == "a2d-qwen2":
            return qwen2_config(cls.config_class(), config, where, has_head)
        return cls.config_class()(
            **read_sizes(config, where, has_head, max_positions=2048),
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            rope_parameters=read_rope(config, where, default_theta=10_000.0),
            mlp_bias=config.get("mlp_bias", False),
        )

    @classmethod
    def read_info(cls, files: CheckpointFiles) -> CheckpointInfo:
        return read_ids(files, _MASKS.get(files.config["model_type"]), (), (cls.block_field,), BLOCK_LENGTH)

    @classmethod
    def backbone_name(cls, name: str) -> str:
        return name


class _BD3LM(_A2D, SDARModel):
    block_field = "block_size"
    blocks_from_prompt_end = True


class _MDLM(_A2D, LLaDAModel):
    block_field = "block_length"


class A2DQwen3BlockModel(_BD3LM):
    model_types = ("a2d-qwen3",)


class A2DQwen2BlockModel(_BD3LM):
    model_types = ("a2d-qwen2",)
    transformers_name = "Qwen2"


class A2DLlamaBlockModel(_BD3LM):
    model_types = ("a2d-llama",)
    transformers_name = "Llama"


class A2DQwen3Model(_MDLM):
    model_types = ("a2d-qwen3",)
    transformers_name = "Qwen3"


class A2DQwen2Model(_MDLM):
    model_types = ("a2d-qwen2",)
    transformers_name = "Qwen2"


class A2DLlamaModel(_MDLM):
    model_types = ("a2d-llama",)


A2D_FAMILIES: tuple[type[DiffusionModel], ...] = (
    *(A2DQwen3BlockModel, A2DQwen2BlockModel, A2DLlamaBlockModel),
    *(A2DQwen3Model, A2DQwen2Model, A2DLlamaModel),
)
