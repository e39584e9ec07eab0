"""Loading and saving both families in their authors' formats, and refused checkpoints."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from rcd_core import ModelConfig, UserError, load_model, new_model
from rcd_core.families.base import CheckpointInfo
from rcd_core.text.tokenizer import load_tokenizer, tokenizer_sha256, train_tokenizer
from tests.rcd_core.checkpoints import GOLDEN, checkpoint, same_weights
from tests.rcd_core.families.overfit import overfit

SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}
INFO = CheckpointInfo(mask_token_id=9, eos_token_ids=(1, 2), pad_token_id=1, block_length=5, rcd={"alpha": "one"})
# Fields of the golden config.json files that an export leaves out: they do not describe the network.
NOT_EXPORTED = {"transformers_version", "bos_token_id", "fuse_cross_entropy", "use_cache"}


def fresh(family: str, **changes: Any) -> Any:
    config = ModelConfig(family=family, **{**SIZES, **changes})  # type: ignore[arg-type]
    return new_model(config, vocab_size=50, info=INFO, seed=3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_saved_and_loaded_is_bit_equal(family: str, tied: bool, tmp_path: Path) -> None:
    model = fresh(family, tie_embeddings=tied)
    model.save_pretrained(tmp_path)
    back = load_model(tmp_path)
    assert same_weights(model, back)
    ids = torch.randint(0, 50, (2, 11))
    assert torch.equal(model.logits(ids), back.logits(ids))
    assert back.info == INFO
    names = load_file(tmp_path / "model.safetensors").keys()
    head = "lm_head.weight" if family == "sdar" else "model.transformer.ff_out.weight"
    assert (head in names) is not tied, "a tied head is not written twice"


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_overfits_a_batch_with_residual_inputs(family: str) -> None:
    assert overfit(load_model(GOLDEN / f"{family}_tiny"), 240, 60) < 0.1


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_export_has_the_authors_names(family: str, tmp_path: Path) -> None:
    """Loaded from the authors' files and saved again: the same names, bit for bit."""
    source = GOLDEN / f"{family}_tiny"
    load_model(source).save_pretrained(tmp_path)
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    theirs, ours = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path))
    theirs = {k: v for k, v in theirs.items() if k not in NOT_EXPORTED}
    assert {k: ours[k] for k in theirs} == theirs


def test_shards_and_an_index_load(tmp_path: Path) -> None:
    source = GOLDEN / "sdar_tiny"
    weights = load_file(source / "model.safetensors")
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, shard in parts.items():
        save_file({n: weights[n] for n in shard}, tmp_path / file)
    index = {"weight_map": {n: file for file, shard in parts.items() for n in shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(source / "config.json", tmp_path)
    assert same_weights(load_model(tmp_path), load_model(source))


@pytest.mark.parametrize(
    ("name", "block_length"),
    [
        ("SDAR-8B-Chat-b32", 32),
        ("RCD-SDAR-8B-b64-Thinking", 64),
        ("SDAR-1.7B-Chat", 4),
        ("SDAR-1.7B-b128", 4),
        ("SDAR-b8x", 4),
        ("models--JetLM--SDAR-4B-Chat-b16/snapshots/0a1b", 16),
    ],
)
def test_block_length_is_the_configs_else_the_names(name: str, block_length: int, tmp_path: Path) -> None:
    bare = checkpoint(tmp_path / name, drop=("block_size",))
    assert load_model(bare).info.block_length == load_model(f"{bare}/").info.block_length == block_length
    trained = checkpoint(tmp_path / name, drop=("block_size",), rcd={"block_length": 12})
    assert load_model(trained).info.block_length == 12
    assert load_model(checkpoint(tmp_path / name, block_size=7)).info.block_length == 7


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_all_ids_that_end_a_sequence_survive(family: str, tmp_path: Path) -> None:
    """As in the releases: config.json has one id, also the padding id; generation_config.json has all of them."""
    source = checkpoint(tmp_path / "a", f"{family}_tiny", eos_token_id=3)
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 3, 6], "pad_token_id": 3}')
    if family == "llada":
        checkpoint(source, "llada_tiny", eos_token_id=3, pad_token_id=3)
    model = load_model(source)
    assert model.info.eos_token_ids == (5, 3, 6) and model.info.pad_token_id == 3
    model.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["eos_token_id"] == 3
    assert GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id == [5, 3, 6]
    assert load_model(tmp_path / "b").info == model.info


def test_the_tokenizer_and_its_chat_template_are_saved_too(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["one two three"], 300)
    new_model(ModelConfig(family="sdar", **SIZES), vocab_size=len(tokenizer), info=INFO, seed=3).save_pretrained(  # type: ignore[arg-type]
        tmp_path, tokenizer
    )
    back = load_tokenizer(tmp_path)
    assert tokenizer_sha256(back) == tokenizer_sha256(tokenizer) and back.mask_token == tokenizer.mask_token
    assert load_model(tmp_path).info == INFO, "the checkpoint's own ids, not the tokenizer's"


def test_stored_rcd_settings_come_back_and_are_checked(tmp_path: Path) -> None:
    rcd = {"start": "self", "residual_temperature": 1.5, "block_length": 4, "alpha": "calibrated_entropy"}
    rcd |= {"alpha_scale": 1.73, "residual_dropout": 0.25, "of_a_later_release": [1]}
    assert load_model(checkpoint(tmp_path, rcd=rcd)).info.rcd == rcd
    for field, value in [
        ("start", "warm"),
        ("alpha", "entropy"),
        ("residual_temperature", 0),
        ("alpha_scale", -1.0),
        ("alpha_scale", "1"),
        ("block_length", 0),
        ("residual_dropout", 1.5),
    ]:
        with pytest.raises(UserError, match=re.escape(f"rcd.{field} is {value!r}")):
            load_model(checkpoint(tmp_path, rcd={**rcd, field: value}))
    with pytest.raises(UserError, match=r"rcd is \[\]"):
        load_model(checkpoint(tmp_path, rcd=[]))


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub cache as left by a download, without network. The cached model's name defines the block length."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository, commit = tmp_path / "models--JetLM--SDAR-1.7B-Chat-b16", "0123456789abcdef0123456789abcdef01234567"
    checkpoint(repository / "snapshots" / commit, drop=("block_size",))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model = load_model("JetLM/SDAR-1.7B-Chat-b16")
    assert model.info.block_length == 16 and same_weights(model, load_model(GOLDEN / "sdar_tiny"))
    with pytest.raises(UserError, match="'JetLM/nothing'.* HF_HUB_OFFLINE"):
        load_model("JetLM/nothing")


def test_dtype_and_attention_are_as_asked() -> None:
    model = load_model(GOLDEN / "sdar_tiny", dtype=torch.bfloat16, attention="eager")
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(model.logits(torch.randint(0, 500, (1, 9)))).all()
    with pytest.raises(UserError, match="attention is 'fast'"):
        load_model(GOLDEN / "sdar_tiny", attention="fast")


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "nothing", "nothing"), (tmp_path, r"config\.json")):
        with pytest.raises(UserError, match=message):
            load_model(path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    shutil.copy(GOLDEN / "sdar_tiny" / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        load_model(tmp_path)
    for field, value, message in (
        ("model_type", "gpt2", "model_type is 'gpt2'"),
        ("num_hidden_layers", 3, r"missing \['model\.layers\.2"),
        ("mask_token_id", 600, "mask_token_id 600"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(checkpoint(tmp_path, **{field: value}))


def test_fresh_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert same_weights(fresh("sdar"), fresh("sdar"))
    assert torch.equal(before, torch.get_rng_state())
    other = new_model(ModelConfig(family="sdar", **SIZES), vocab_size=50, info=INFO, seed=4)
    assert not same_weights(fresh("sdar"), other)
    assert fresh("llada").embedding.weight.std().item() == pytest.approx(1.0, abs=0.1)
    assert fresh("sdar", tie_embeddings=True).embedding.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
