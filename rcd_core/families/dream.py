"""Dream and DiffuCoder: Qwen2 layers without the causal mask, whose logits stay shifted as in the autoregressive model.

They decode a whole canvas like LLaDA: in one block as the authors do, or block by block with Fast-dLLM's caches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rcd_core.families.base import CheckpointInfo, DiffusionModel, read_ids
from rcd_core.families.config_json import read_rope, read_sizes, require_values, write_sizes
from rcd_core.families.files import CheckpointFiles
from rcd_core.families.llada import LLaDAModel
from rcd_core.families.sdar import refuse_windows

MASK_TOKEN_ID, EOS_TOKEN_ID = 151666, 151643  # <|mask|>, <|endoftext|>
BLOCK_LENGTH = 32  # Fast-dLLM's


class DreamModel(LLaDAModel):
    model_types = ("Dream",)
    transformers_name = "Qwen2"
    shifted = True
    default_schedule = "time"

    def official_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        own = {"architectures": ["DreamModel"], "block_length": self.info.block_length, "model_type": "Dream"}
        return qwen2_fields(self) | own, self.stored_weights()

    @classmethod
    def read_config(cls, config: dict[str, Any], where: Path, has_head: bool) -> Any:
        return qwen2_config(cls.config_class(), config, where, has_head)

    @classmethod
    def read_info(cls, files: CheckpointFiles) -> CheckpointInfo:
        return read_ids(files, MASK_TOKEN_ID, (EOS_TOKEN_ID,), ("block_length",), BLOCK_LENGTH)

    @classmethod
    def backbone_name(cls, name: str) -> str:
        return name


def qwen2_fields(model: DiffusionModel) -> dict[str, Any]:
    """Of config.json, for layers of Qwen2."""
    c = model.config
    config = model.common_fields() | write_sizes(c)
    if c.head_dim * c.num_attention_heads == c.hidden_size:
        del config["head_dim"]  # which the authors' code does not read
    return config | {
        "attention_dropout": 0.0,
        "initializer_range": c.initializer_range,
        "max_window_layers": c.num_hidden_layers,
        "sliding_window": None,
        "use_cache": True,
        "use_sliding_window": False,
    }


def qwen2_config(config_class: Any, config: dict[str, Any], where: Path, has_head: bool) -> Any:
    """Qwen2Config with biases of q, k and v, as all of Qwen2's."""
    sizes = read_sizes(config, where, has_head, max_positions=32768)
    require_values(config, {"attention_bias": True}, where)
    del sizes["attention_bias"]
    refuse_windows(config, where)
    return config_class(
        **sizes,
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        initializer_range=config.get("initializer_range", 0.02),
        rope_parameters=read_rope(config, where),
    )
