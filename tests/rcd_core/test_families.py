"""Loading and saving: both families in their authors' formats, sharded or not, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rcd_core import ModelConfig, UserError, load_model, new_model
from rcd_core.families.base import CheckpointInfo

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}
INFO = CheckpointInfo(mask_token_id=9, eos_token_ids=(1, 2), pad_token_id=1, block_length=5, rcd={"alpha": "one"})


def fresh(family: str, **changes: Any) -> Any:
    config = ModelConfig(family=family, **{**SIZES, **changes})  # type: ignore[arg-type]
    return new_model(config, vocab_size=50, info=INFO, seed=3)


def same_weights(a: Any, b: Any) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_saved_and_loaded_is_bit_equal(family: str, tied: bool, tmp_path: Path) -> None:
    model = fresh(family, tie_embeddings=tied)
    model.save_pretrained(tmp_path)
    back = load_model(tmp_path)
    assert same_weights(model, back)
    ids = torch.randint(0, 50, (2, 11))
    assert torch.equal(model.logits(ids), back.logits(ids))
    want = INFO if family == "sdar" else CheckpointInfo(**{**vars(INFO), "eos_token_ids": (1,)})
    assert (back.info.mask_token_id, back.info.pad_token_id, back.info.block_length, back.info.rcd) == (
        9,
        1,
        5,
        INFO.rcd,
    )
    assert back.info.eos_token_ids == want.eos_token_ids
    names = load_file(tmp_path / "model.safetensors").keys()
    head = "lm_head.weight" if family == "sdar" else "model.transformer.ff_out.weight"
    assert (head in names) is not tied, "a tied head is not written twice"


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_export_has_the_authors_names(family: str, tmp_path: Path) -> None:
    """What is loaded from the authors' files comes back out under the same names, bit for bit."""
    source = GOLDEN / f"{family}_tiny"
    load_model(source).save_pretrained(tmp_path)
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    theirs, ours = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path))
    for key in ("model_type", "mask_token_id", "vocab_size", "rope_theta", "architectures"):
        assert theirs[key] == ours[key]


def test_shards_and_an_index_load(tmp_path: Path) -> None:
    source = GOLDEN / "sdar_tiny"
    weights = load_file(source / "model.safetensors")
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, mine in parts.items():
        save_file({n: weights[n] for n in mine}, tmp_path / file)
    index = {"weight_map": {n: file for file, mine in parts.items() for n in mine}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(source / "config.json", tmp_path)
    assert same_weights(load_model(tmp_path), load_model(source))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match="missing: b.safetensors"):
        load_model(tmp_path)


def test_plain_qwen3_loads_as_a_start(tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "sdar_tiny" / "config.json").read_text())
    config |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    del config["block_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "sdar_tiny" / "model.safetensors", tmp_path)
    model = load_model(tmp_path)
    assert model.family == "sdar" and model.info.block_length == 4


def test_dtype_and_attention_are_as_asked() -> None:
    model = load_model(GOLDEN / "sdar_tiny", dtype=torch.bfloat16, attention="eager")
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(model.logits(torch.randint(0, 500, (1, 9)))).all()
    with pytest.raises(UserError, match="attention is 'fast'; allowed: sdpa, eager"):
        load_model(GOLDEN / "sdar_tiny", attention="fast")


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no config.json"):
        load_model(tmp_path)
    config = json.loads((GOLDEN / "sdar_tiny" / "config.json").read_text())

    def with_config(**changes: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        return tmp_path

    with pytest.raises(UserError, match="model_type is 'gpt2'; supported: sdar, qwen3, llada, llama"):
        load_model(with_config(model_type="gpt2"))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="only pickled weights .*convert"):
        load_model(with_config())
    shutil.copy(GOLDEN / "sdar_tiny" / "model.safetensors", tmp_path)
    with pytest.raises(UserError, match="weights do not fit"):
        load_model(with_config(num_hidden_layers=3))
    with pytest.raises(UserError, match="mask_token_id 600 lies outside"):
        load_model(with_config(mask_token_id=600))


def test_fresh_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert same_weights(fresh("sdar"), fresh("sdar"))
    assert torch.equal(before, torch.get_rng_state())
    other = new_model(ModelConfig(family="sdar", **SIZES), vocab_size=50, info=INFO, seed=4)
    assert not same_weights(fresh("sdar"), other)
    assert fresh("llada").embedding.weight.std().item() == pytest.approx(1.0, abs=0.1)
    assert fresh("sdar", tie_embeddings=True).embedding.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
