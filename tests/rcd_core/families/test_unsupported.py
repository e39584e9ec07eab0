"""Adapters, quantised weights and vocabularies of different sizes are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rcd_core import UserError, load_model
from rcd_core.families.loading import describe_checkpoint
from tests.rcd_core.checkpoints import checkpoint


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "next to whole weights"])
@pytest.mark.parametrize("read", [load_model, describe_checkpoint])
def test_an_adapter_is_named_with_its_base(read: Any, whole: bool, tmp_path: Path) -> None:
    if whole:
        checkpoint(tmp_path)
    write(tmp_path / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "/models/SDAR-8B-Chat"})
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"/models/SDAR-8B-Chat"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"/models/SDAR-8B-Chat"):
        load_model(f"file://{tmp_path}")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        read(tmp_path)


@pytest.mark.parametrize("source", ["sdar_tiny", "llada_tiny"])
@pytest.mark.parametrize(
    "value",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ],
)
def test_quantised_weights_are_named_with_their_method(value: dict[str, Any], source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"quantization_config .*{value['quant_method']}"):
        load_model(checkpoint(tmp_path / "a", source, quantization_config=value))
    with pytest.raises(UserError, match="compression_config"):
        load_model(checkpoint(tmp_path / "b", source, compression_config=value))
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        directory = checkpoint(tmp_path / name, source)
        write(directory / name, value)
        with pytest.raises(UserError, match=f"{name} .*{value['quant_method']}"):
            load_model(directory)


TOKENIZERS: list[tuple[str, Any]] = [
    ("tokenizer.json", {"model": {"vocab": {"a": 0, "<x>": 512}}}),
    ("tokenizer.json", {"model": {"vocab": [[f"t{i}", 0.0] for i in range(512)] + [["<x>", 0.0]]}}),
    ("tokenizer.json", {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 512, "content": "<x>"}]}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"512": {"content": "<x>"}}}),
    ("added_tokens.json", {"<x>": 512}),
    ("vocab.json", {"a": 0, "<x>": 512}),
]


@pytest.mark.parametrize(("name", "content"), TOKENIZERS)
def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows(name: str, content: Any, tmp_path: Path) -> None:
    write(checkpoint(tmp_path) / name, content)
    with pytest.raises(UserError, match=f"{name} .*<x>.* 512.*512 rows"):
        load_model(tmp_path)
    write(tmp_path / name, json.loads(json.dumps(content).replace("512", "511").replace('["t0", 0.0], ', "")))
    load_model(tmp_path)


def test_vocabulary_sizes_of_the_config_and_of_the_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size is 500, but the embedding has 512 rows"):
        load_model(checkpoint(tmp_path / "a", vocab_size=500))
    llada = checkpoint(tmp_path / "b", "llada_tiny")
    rows = json.loads((llada / "config.json").read_text())["embedding_size"]
    with pytest.raises(UserError, match=f"vocab_size is {rows + 1}, but embedding_size is {rows}"):
        load_model(checkpoint(tmp_path / "b", "llada_tiny", vocab_size=rows + 1))
    file = checkpoint(tmp_path / "c") / "model.safetensors"
    whole = load_file(file)
    save_file({**whole, "lm_head.weight": whole["lm_head.weight"][:500].clone()}, file)
    with pytest.raises(UserError, match=r"lm_head\.weight is \(500, 64\)"):
        load_model(tmp_path / "c")
