"""Plain Qwen3 and Llama checkpoints as starting weights, their rotary scaling, and refused networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rcd_core import Decoder, DecodeSettings, UserError, load_model
from tests.rcd_core.checkpoints import GOLDEN, checkpoint, edit_config, same_weights
from tests.rcd_core.families.test_families import fresh


def test_plain_qwen3_loads_as_a_start(tmp_path: Path) -> None:
    qwen = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    model = load_model(checkpoint(tmp_path, drop=("block_size",), **qwen))
    assert model.family == "sdar" and model.info.block_length == 4
    with pytest.raises(UserError, match="mask_token_id 151669"):
        load_model(checkpoint(tmp_path, drop=("mask_token_id",), model_type="qwen3"))


@pytest.mark.parametrize("modern", [True, False])
def test_the_tokenizers_mask_token_is_found(modern: bool, tmp_path: Path) -> None:
    """If config.json has no mask_token_id. transformers 5 lists added tokens in tokenizer.json only."""
    checkpoint(tmp_path, drop=("mask_token_id",), model_type="qwen3")
    tokens: dict[str, Any] = {"mask_token": "<|MASK|>"}
    if modern:
        added = [{"id": 400, "content": "<|other|>"}, {"id": 401, "content": "<|MASK|>"}]
        (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    else:
        tokens["added_tokens_decoder"] = {"400": {"content": "<|other|>"}, "401": {"content": "<|MASK|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens))
    assert load_model(tmp_path).mask_token_id == 401


def tiny_llama(directory: Path, **changes: Any) -> Path:
    """A Llama checkpoint as transformers writes it."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 50, "num_key_value_heads": 2}
    config = LlamaConfig(eos_token_id=[1, 2], pad_token_id=None, initializer_range=0.3, **sizes, **changes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def test_a_plain_llama_needs_a_mask_token_and_becomes_a_llada(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "llama")
    with pytest.raises(UserError, match="mask_token_id"):
        load_model(source)
    edit_config(source, mask_token_id=49)
    model = load_model(source)
    assert (model.family, model.info.eos_token_ids, model.info.pad_token_id) == ("llada", (1, 2), 1)
    ids = torch.randint(0, 49, (2, 9))
    plain = LlamaForCausalLM.from_pretrained(source)
    full = torch.zeros(2, 1, 9, 9)  # additive: every token sees every token
    torch.testing.assert_close(model.logits(ids), plain(ids, attention_mask=full).logits, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path / "llada")
    assert json.loads((tmp_path / "llada" / "config.json").read_text())["model_type"] == "llada"
    back = load_model(tmp_path / "llada")
    assert same_weights(model, back) and back.info == model.info
    assert torch.equal(model.logits(ids), back.logits(ids))


def test_a_llada_of_another_vocabulary_names_its_mask_token(tmp_path: Path) -> None:
    """iLLaDA: tied embeddings, shared key/value heads, mask token 5. LLaDA's id is another token there."""
    model = load_model(edit_config(tiny_llama(tmp_path / "start", tie_word_embeddings=True), mask_token_id=5))
    model.save_pretrained(tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert (config["model_type"], config["weight_tying"], config["n_kv_heads"]) == ("llada", True, 2)
    again = load_model(tmp_path / "one")
    assert again.mask_token_id == 5 and again.lm_head.weight is again.embedding.weight and same_weights(model, again)
    s = DecodeSettings(block_length=4, max_new_tokens=8, residual=True, start="self", residual_temperature=1.0)
    assert 5 not in Decoder(again).generate([[7, 8]], s)[0].canvas_ids
    edit_config(tmp_path / "one", mask_token_id=None)
    with pytest.raises(UserError, match="mask_token_id"):
        load_model(tmp_path / "one")


@pytest.mark.parametrize("written", ["rope_parameters", "rope_scaling"])
def test_llama3_rotary_scaling_survives_saving(written: str, tmp_path: Path) -> None:
    """LLaDA's config cannot describe it, so such a model is saved as Llama."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}
    source = tiny_llama(tmp_path / "llama", rope_parameters=rope, max_position_embeddings=512)
    plain = LlamaForCausalLM.from_pretrained(source)
    edit_config(source, mask_token_id=49)
    if written == "rope_scaling":  # the form before transformers 5
        edit_config(source, rope_parameters=None, rope_theta=500000.0, rope_scaling={"rope_type": "llama3", **LLAMA3})
    model = load_model(source)
    ids = torch.randint(0, 49, (1, 200))
    want = plain(ids, attention_mask=torch.zeros(1, 1, 200, 200)).logits
    torch.testing.assert_close(model.logits(ids), want, atol=1e-4, rtol=0)
    edit_config(source, rope_parameters=None, rope_scaling=None, rope_theta=500000.0)
    assert (load_model(source).logits(ids) - want).abs().max() > 0.1, "the scaling matters at this length"
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}
    back = load_model(tmp_path / "saved")
    assert back.info == model.info and torch.equal(back.logits(ids), model.logits(ids))
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(ids, attention_mask=torch.zeros(1, 1, 200, 200)).logits, want, atol=1e-4, rtol=0)


def test_other_shapes_of_llama_are_saved_as_llama(tmp_path: Path) -> None:
    # 4 heads of 16 are not the width of 32, and LLaDA has no field for the head width.
    model = fresh("llada", head_dim=16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    assert same_weights(load_model(tmp_path), model)
    biased = edit_config(tiny_llama(tmp_path / "biased", attention_bias=True), mask_token_id=49)
    load_model(biased).save_pretrained(tmp_path / "saved")
    assert same_weights(load_model(tmp_path / "saved"), load_model(biased))


def test_qwen3_rotary_scaling_is_written_as_sdar_reads_it(tmp_path: Path) -> None:
    model = load_model(checkpoint(tmp_path / "a", rope_scaling=YARN))
    ids = torch.randint(0, 500, (1, 100))
    assert not torch.allclose(model.logits(ids), load_model(GOLDEN / "sdar_tiny").logits(ids), atol=1e-3)
    model.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["rope_scaling"] == YARN
    assert torch.equal(load_model(tmp_path / "b").logits(ids), model.logits(ids))


THETA = 1_000_000.0  # of the golden SDAR checkpoint
SCALED = {"rope_theta": THETA, **YARN}


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (
            "sdar_tiny",
            {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}, "rope_scaling": YARN},
            r"rope_parameters\.rope_type is 'default', but rope_scaling\.rope_type is 'yarn'",
        ),
        (
            "sdar_tiny",
            {"rope_parameters": SCALED, "rope_scaling": {"type": "default"}},
            r"rope_parameters\.rope_type is 'yarn', but rope_scaling\.type is 'default'",
        ),
        (
            "sdar_tiny",
            {"rope_parameters": SCALED, "rope_scaling": {**YARN, "factor": 8.0}},
            r"rope_parameters\.factor is 4\.0, but rope_scaling\.factor is 8\.0",
        ),
        (
            "sdar_tiny",
            {"rope_parameters": SCALED, "rope_scaling": {**YARN, "attention_factor": 2.0}},
            r"rope_parameters\.attention_factor is None, but rope_scaling\.attention_factor is 2\.0",
        ),
        (
            "sdar_tiny",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
            r"rope_parameters\.rope_theta is 10000\.0, but rope_theta is 1000000",
        ),
        (
            "sdar_tiny",
            {"rope_scaling": {**YARN, "rope_theta": 10_000.0}},
            r"rope_scaling\.rope_theta is 10000\.0, but rope_theta is 1000000",
        ),
        (
            "sdar_tiny",
            {"rope_scaling": {**YARN, "type": "linear"}},
            r"rope_scaling\.rope_type is 'yarn', but rope_scaling\.type is 'linear'",
        ),
        (
            "sdar_tiny",
            {"rope_scaling": YARN, "original_max_position_embeddings": 64},
            r"original_max_position_embeddings is 32, but original_max_position_embeddings is 64",
        ),
        ("sdar_tiny", {"rope_scaling": {"factor": 4.0}}, r"rope_scaling\.factor .*rope_type"),
        ("llada_tiny", {"rope_parameters": YARN}, "rope_parameters is 'yarn'"),
    ],
)
def test_two_values_of_one_rotary_setting_are_refused(
    source: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        load_model(checkpoint(tmp_path, source, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": SCALED, "rope_scaling": YARN},
        {"rope_parameters": SCALED, "rope_scaling": {**YARN, "type": "yarn", "factor": 4, "attention_factor": None}},
        {"rope_parameters": {"rope_theta": THETA}, "rope_scaling": YARN},
        {"rope_parameters": SCALED, "rope_scaling": None, "rope_theta": None},
    ],
)
def test_two_spellings_of_one_rotary_setting_that_agree_are_read(changes: dict[str, Any], tmp_path: Path) -> None:
    model = load_model(checkpoint(tmp_path, **changes))
    assert model.config.rope_parameters == SCALED


@pytest.mark.parametrize(
    ("source", "changes", "field"),
    [
        ("sdar_tiny", {"model_type": "sdar_moe"}, "model_type"),
        ("sdar_tiny", {"num_experts": 128}, "num_experts"),
        ("sdar_tiny", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("sdar_tiny", {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
        ("sdar_tiny", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ("sdar_tiny", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling .*'dynamic'"),
        ("sdar_tiny", {"rope_scaling": {"type": "linear"}}, "factor is None"),
        ("sdar_tiny", {"rope_theta": None}, "rope_theta is None"),
        ("sdar_tiny", {"hidden_size": "64"}, "hidden_size"),
        ("sdar_tiny", {"hidden_size": None}, "hidden_size"),
        ("sdar_tiny", {"eos_token_id": "eos"}, "eos_token_id is 'eos'"),
        ("sdar_tiny", {"block_size": 0}, "block_size is 0"),
        ("sdar_tiny", {"pad_token_id": 512}, "pad_token_id 512"),
        ("sdar_tiny", {"intermediate_size": 100}, r"\(64, 128\).*\(64, 100\)"),
        ("llada_tiny", {"block_type": "sequential"}, "block_type is 'sequential'"),
        ("llada_tiny", {"include_qkv_bias": True}, "include_qkv_bias is True"),
        ("llada_tiny", {"alibi": True}, "alibi is True"),
        ("llada_tiny", {"multi_query_attention": True}, "multi_query_attention is True"),
        ("llada_tiny", {"model_type": "llada_moe"}, "model_type"),
    ],
)
def test_unsupported_networks_are_refused(source: str, changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=field):
        load_model(checkpoint(tmp_path, source, **changes))
