"""Fast-dLLM v2: Qwen2.5 with block-causal attention, whose logits stay shifted as in the autoregressive model.

Blocks are counted from position 0, and decoded in sub-blocks (decoding/sub_blocks.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rcd_core.families.base import CheckpointInfo, read_ids
from rcd_core.families.dream import qwen2_config, qwen2_fields
from rcd_core.families.files import CheckpointFiles
from rcd_core.families.sdar import SDARModel

MASK_TOKEN_ID, EOS_TOKEN_ID = 151665, 151645  # |<MASK>|, <|im_end|>
BLOCK_LENGTH, SUB_BLOCK_LENGTH = 32, 8


class FastDLLMModel(SDARModel):
    model_types = ("Fast_dLLM_Qwen",)
    transformers_name = "Qwen2"
    shifted = True
    default_sub_block_length = SUB_BLOCK_LENGTH

    def official_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        own = {
            "architectures": ["Fast_dLLM_QwenForCausalLM"],
            "bd_size": self.info.block_length,
            "layer_types": ["full_attention"] * self.config.num_hidden_layers,
            "model_type": "Fast_dLLM_Qwen",
        }
        return qwen2_fields(self) | own, self.stored_weights()

    @classmethod
    def read_config(cls, config: dict[str, Any], where: Path, has_head: bool) -> Any:
        return qwen2_config(cls.config_class(), config, where, has_head)

    @classmethod
    def read_info(cls, files: CheckpointFiles) -> CheckpointInfo:
        return read_ids(files, MASK_TOKEN_ID, (EOS_TOKEN_ID,), ("bd_size", "block_length"), BLOCK_LENGTH)
