"""Small checkpoints for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rcd_core import ModelConfig, new_model
from rcd_core.families.base import CheckpointInfo
from rcd_core.text.tokenizer import mask_token_id, stop_token_ids, train_tokenizer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target (marked as RCD), reference, and esc, whose every token is the escape character. One tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")
    tokenizer = train_tokenizer(["the quick fox over the lazy dog 漢字 🙂 Über\n"] * 50, 330)
    info = CheckpointInfo(mask_token_id(tokenizer), stop_token_ids(tokenizer), tokenizer.pad_token_id, 8)
    for name, width, rcd in (("target", 32, {"start": "zero"}), ("reference", 16, {}), ("esc", 16, {})):
        info.rcd = rcd
        sizes = ModelConfig(
            family="sdar",
            hidden_size=width,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            intermediate_size=32,
            max_positions=256,
        )
        model = new_model(sizes, vocab_size=len(tokenizer), info=info, seed=3)
        if name == "esc":
            with torch.no_grad():  # no layer adds anything, and the head answers the mask's embedding with one token
                for layer in model.backbone.model.layers:
                    layer.self_attn.o_proj.weight.zero_()
                    layer.mlp.down_proj.weight.zero_()
                escape = tokenizer("\x1b", add_special_tokens=False)["input_ids"][0]
                model.lm_head_weight[escape] = 10 * model.embedding.weight[model.mask_token_id]
        model.save_pretrained(root / name, tokenizer=tokenizer)
    return root
