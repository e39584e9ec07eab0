"""Safetensors on disk: shards and their index, dtypes, damage, and saves that were not finished."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rcd_core import UserError, load_model
from rcd_core.families import weights as weights_module
from tests.rcd_core.checkpoints import GOLDEN, checkpoint, same_weights

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The golden SDAR checkpoint in several shards, and its index."""
    load_model(GOLDEN / "sdar_tiny").save_pretrained(tmp_path / "sharded", max_shard_bytes=100_000)
    return tmp_path / "sharded"


def edit_index(directory: Path, **changes: str | None) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] = {k: v for k, v in {**index["weight_map"], **changes}.items() if v is not None}
    (directory / INDEX).write_text(json.dumps(index))


def test_shards_are_as_hugging_face_writes_them(sharded: Path) -> None:
    whole = load_file(GOLDEN / "sdar_tiny" / "model.safetensors")
    shards = {f.name: load_file(f) for f in sharded.glob("*.safetensors")}
    assert len(shards) > 3 and sorted(shards)[0] == f"model-00001-of-{len(shards):05}.safetensors"
    for tensors in shards.values():
        assert sum(t.nbytes for t in tensors.values()) <= 100_000 or len(tensors) == 1
    index = json.loads((sharded / INDEX).read_text())
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert same_weights(load_model(sharded), load_model(GOLDEN / "sdar_tiny"))


def test_saving_over_a_checkpoint_leaves_only_the_new_one(sharded: Path) -> None:
    """Also where the model's own tensors are mapped from the files that are replaced."""
    model = load_model(sharded)
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(sharded)
    assert [f.name for f in sharded.glob("model*")] == ["model.safetensors"]
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
    assert same_weights(load_model(sharded), model)
    with pytest.raises(UserError, match="max_shard_bytes is 0"):
        model.save_pretrained(sharded, max_shard_bytes=0)


def test_a_save_that_was_not_finished_does_not_load(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the third shard, over an older checkpoint whose first shards are already replaced."""
    model = load_model(GOLDEN / "rcd" / "sdar_ref_tiny")
    written: list[Any] = []

    def full_disk(tensors: Any, path: Path, **options: Any) -> None:
        if len(written) == 2:
            path.write_bytes(b"half")
            raise OSError("no space left")
        written.append(path)
        save_file(tensors, path, **options)

    monkeypatch.setattr(weights_module, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(sharded, max_shard_bytes=30_000)
    assert len(written) == 2 and len(list(sharded.glob("*.partial"))) == 1
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(sharded)
    monkeypatch.undo()
    model.save_pretrained(sharded)
    assert same_weights(load_model(sharded), model)
    assert not list(sharded.glob("*.partial"))


def test_files_that_do_not_hold_what_they_should(sharded: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_model(sharded)

    index = json.loads((sharded / INDEX).read_text())
    first, other = "model.norm.weight", "lm_head.weight"
    file, other_file = index["weight_map"][first], index["weight_map"][other]
    assert file != other_file

    edit_index(sharded, **{first: other_file})
    refused(f"{other_file}: {first} .*{INDEX}")
    edit_index(sharded, **{first: None})
    refused(f"{file}: {first} .*{INDEX}")
    edit_index(sharded, **{first: "../model.safetensors"})
    refused(f"{INDEX}: {first} is in '../model.safetensors'")
    edit_index(sharded, **{first: file})
    load_model(sharded)

    content = (sharded / file).read_bytes()
    (sharded / file).write_bytes(content[:-100])
    refused(f"{file} is damaged")
    (sharded / file).write_bytes(b"")
    refused(f"{file} is damaged")
    (sharded / file).unlink()
    refused(file)
    (sharded / file).write_bytes(content)
    save_file({**load_file(sharded / other_file), first: torch.zeros(64)}, sharded / other_file)
    refused(f"{other_file}: {first} .*{file}|{file}: {first} .*{other_file}")
    (sharded / INDEX).write_text("{}")
    refused(f"{INDEX} .*weight_map")
    (sharded / INDEX).write_text("{")
    refused(INDEX)


def test_dtypes(tmp_path: Path) -> None:
    """Files that mix dtypes take the embedding's, like any checkpoint; quantised ones are refused."""
    file = checkpoint(tmp_path) / "model.safetensors"
    whole = load_file(file)
    mixed = {name: t if "norm" in name else t.bfloat16() for name, t in whole.items()}
    save_file(mixed, file)
    model = load_model(tmp_path)
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16}
    exact = load_model(tmp_path, dtype=torch.float32).state_dict()["backbone.model.norm.weight"]
    assert torch.equal(exact, whole["model.norm.weight"]), "norms are not rounded on their way to a wider dtype"
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert same_weights(load_model(tmp_path / "saved"), model)
    save_file({**mixed, "lm_head.weight": whole["lm_head.weight"].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(UserError, match="lm_head.weight is F8_E4M3"):
        load_model(tmp_path)


TIE = {"sdar_tiny": "tie_word_embeddings", "llada_tiny": "weight_tying"}
NAMES = {
    "sdar_tiny": ("model.embed_tokens.weight", "lm_head.weight"),
    "llada_tiny": ("model.transformer.wte.weight", "model.transformer.ff_out.weight"),
}


@pytest.mark.parametrize("source", ["sdar_tiny", "llada_tiny"])
def test_a_head_that_differs_from_the_embedding_is_kept_although_the_config_ties_it(
    source: str, tmp_path: Path
) -> None:
    ids = torch.arange(20)[None]
    want = load_model(GOLDEN / source).logits(ids)
    checkpoint(tmp_path / "a", source, **{TIE[source]: True})
    with pytest.warns(UserWarning, match=r"weight_tying.*lm_head\.weight"):
        model = load_model(tmp_path / "a")
    assert torch.equal(model.logits(ids), want)
    weights = {name.removeprefix("backbone."): tensor for name, tensor in model.state_dict().items()}
    for saved in (model, model.with_weights(weights)):
        saved.save_pretrained(tmp_path / "b")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(load_model(tmp_path / "b").logits(ids), want)
    model.lm_head_weight.data.zero_()
    assert model.embedding.weight.any(), "two tensors"


@pytest.mark.parametrize("source", ["sdar_tiny", "llada_tiny"])
@pytest.mark.parametrize("config", [True, False, None])
@pytest.mark.parametrize("head", ["equal", "absent"])
def test_a_head_is_tied_as_the_config_says_and_by_the_files_where_it_is_silent(
    head: str, config: bool | None, source: str, tmp_path: Path
) -> None:
    file = checkpoint(tmp_path, source, **{TIE[source]: config}) / "model.safetensors"
    embedding_name, head_name = NAMES[source]
    whole = load_file(file)
    del whole[head_name]
    if head == "equal":
        whole[head_name] = whole[embedding_name].clone()
    save_file(whole, file)
    if head == "absent" and config is False:
        with pytest.raises(UserError, match=r"lm_head\.weight .*tie_word_embeddings"):
            load_model(tmp_path)
        return
    model = load_model(tmp_path)
    assert torch.equal(model.lm_head_weight, whole[embedding_name])
    assert (model.lm_head_weight is model.embedding.weight) is (config is True or head == "absent")


def test_a_head_of_another_dtype_or_shape_under_a_config_that_ties_it(tmp_path: Path) -> None:
    """Equal after the cast to the embedding's dtype is equal."""
    file = checkpoint(tmp_path, tie_word_embeddings=True) / "model.safetensors"
    whole = load_file(file)
    embedding = whole["model.embed_tokens.weight"]
    rounded = {**whole, "model.embed_tokens.weight": embedding.bfloat16(), "lm_head.weight": embedding}
    save_file(rounded, file)
    model = load_model(tmp_path)
    assert model.lm_head_weight is model.embedding.weight
    save_file({**whole, "lm_head.weight": embedding[:-1].clone()}, file)
    with pytest.raises(UserError, match=r"lm_head\.weight is \(511, 64\)"):
        load_model(tmp_path)


def test_tables_that_are_no_weights_are_left_aside_and_doubles_are_not(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, "llada_tiny") / "model.safetensors"
    whole = load_file(file)
    save_file({**whole, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file)
    assert same_weights(load_model(tmp_path), load_model(GOLDEN / "llada_tiny"))
    save_file({**whole, "model.norm.weight": whole["model.transformer.ln_f.weight"].clone()}, file)
    with pytest.raises(UserError, match=r"ln_f\.weight .*norm\.weight|norm\.weight .*ln_f\.weight"):
        load_model(tmp_path)
