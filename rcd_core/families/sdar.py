"""SDAR: Qwen3 with block diffusion. Plain Qwen3 checkpoints load as starting weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from rcd_core.errors import UserError
from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.config_json import read_rope, read_sizes, write_sizes
from rcd_core.families.files import CheckpointFiles

MASK_TOKEN_ID = 151669  # <|MASK|> of every published SDAR tokenizer
EOS_TOKEN_IDS = (151645, 151643)  # <|im_end|>, <|endoftext|>
BLOCK_LENGTH = 4


class SDARModel(DiffusionModel):
    family = "sdar"
    model_types: ClassVar[tuple[str, ...]] = ("sdar", "qwen3")
    transformers_name = "Qwen3"
    threshold_inclusive = False
    whole_canvas = False
    blocks_from_prompt_end = False
    default_start = "zero"

    def attention_block(self, block_length: int) -> int | None:
        return block_length

    def official_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = self.common_fields() | write_sizes(self.config)
        config |= {
            "architectures": ["SDARForCausalLM"],
            "model_type": "sdar",
            "attention_dropout": 0.0,
            "block_size": self.info.block_length,
            "initializer_range": self.config.initializer_range,
            "max_window_layers": self.config.num_hidden_layers,
            "sliding_window": None,
            "use_cache": True,
            "use_sliding_window": False,
        }
        return config, self.stored_weights()

    @classmethod
    def read_config(cls, config: dict[str, Any], where: Path, has_head: bool) -> Any:
        sizes = read_sizes(config, where, has_head, max_positions=32768)
        refuse_windows(config, where)
        return cls.config_class()(
            **sizes,
            head_dim=config.get("head_dim") or 128,  # the authors' class default, whatever the width
            initializer_range=config.get("initializer_range", 0.02),
            rope_parameters=read_rope(config, where),
        )

    @classmethod
    def read_info(cls, files: CheckpointFiles) -> CheckpointInfo:
        eos = files.eos_token_ids(EOS_TOKEN_IDS)
        return CheckpointInfo(
            mask_token_id=files.mask_token_id(MASK_TOKEN_ID),
            eos_token_ids=eos,
            pad_token_id=files.pad_token_id((eos or EOS_TOKEN_IDS)[-1]),
            block_length=files.block_length(("block_size", "block_length"), BLOCK_LENGTH),
            rcd=files.rcd(),
        )


def refuse_windows(config: dict[str, Any], where: Path) -> None:
    """Raise UserError for sliding-window attention."""
    windowed = config.get("use_sliding_window") and config.get("sliding_window") is not None
    if windowed or set(config.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(
            f"{where}: config.json sets sliding-window attention (use_sliding_window, layer_types), which block "
            "diffusion does not have; set use_sliding_window to false and remove layer_types to use full attention"
        )
