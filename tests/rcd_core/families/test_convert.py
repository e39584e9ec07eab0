"""Autoregressive checkpoints as the start of diffusion models: tiny random ones of transformers' own classes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rcd_core import Decoder, DecodeSettings
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.families.convert import converted, convertible
from rcd_core.families.loading import load_model
from rcd_core.io.gguf import package_file
from rcd_core.text.tokenizer import add_mask_token, chat_texts, load_tokenizer, mask_token_id, train_tokenizer
from rcd_core.training.data.batches import Collator
from rcd_core.training.settings import ResidualSettings, TrainSettings
from tests.rcd_core.families.overfit import overfit

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # transformers' 0.02 makes all tokens alike at this width
}
NAMES = ("Llama", "Qwen2", "Qwen3")


@cache
def _plain_tokenizer() -> Any:
    """Without a mask token: its vocabulary is 300 minus it, and <|unused|> is reserved."""
    tokenizer = train_tokenizer(["the quick fox"] * 4, 299)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        if token["content"] == "<|MASK|>":
            token["content"] = "<|unused|>"
    vocabulary = content["model"]["vocab"]
    vocabulary["<|unused|>"] = vocabulary.pop("<|MASK|>")
    return json.dumps(content), tokenizer.chat_template


def save_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer

    content, template = _plain_tokenizer()
    tokenizer: Any = transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(content), eos_token="<|im_end|>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)


def save(directory: Path, name: str, **changes: Any) -> Any:
    """A checkpoint of an autoregressive model with its tokenizer. Returns transformers' model, in fp64."""
    save_tokenizer(directory)
    rows = changes.pop("vocab_size", len(load_tokenizer(directory)))
    sizes = SIZES | ({"head_dim": 8} if name == "Qwen3" else {}) | changes
    config = getattr(transformers, f"{name}Config")(vocab_size=rows, eos_token_id=2, **sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.save_pretrained(directory)
    return model.double()


def convert(directory: Path, mask: str | None = None, **options: Any) -> DiffusionModel:
    tokenizer = load_tokenizer(directory)
    add_mask_token(tokenizer, mask)
    return converted(str(directory), tokenizer, 4, dtype=torch.float64, **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_one_token_are_the_autoregressive_model(tmp_path: Path, name: str, tied: bool) -> None:
    """Its causal attention and its logits, for all tokens that it knew."""
    theirs = save(tmp_path, name, tie_word_embeddings=tied)
    ours = convert(tmp_path)
    known = theirs.config.vocab_size
    ids = torch.randint(0, known, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids, 1)[..., :known], theirs(ids).logits, atol=1e-9, rtol=0)
        assert not torch.allclose(ours.logits(ids, 4)[..., :known], theirs(ids).logits, atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_a_new_mask_token_gets_the_mean_row_and_the_export_loads(tmp_path: Path, tied: bool) -> None:
    theirs = save(tmp_path / "start", "Llama", tie_word_embeddings=tied)
    known = theirs.config.vocab_size
    model = convert(tmp_path / "start")
    assert model.mask_token_id == known and model.vocab_size % 64 == 0 and model.vocab_size > known
    tables = [(model.embedding.weight, theirs.model.embed_tokens.weight), (model.lm_head_weight, theirs.lm_head.weight)]
    for ours, before in tables:
        assert torch.equal(ours[:known], before), "tokens of old keep their rows"
        mean = before.mean(0).expand(model.vocab_size - known, -1)
        torch.testing.assert_close(ours[known:], mean, atol=1e-6, rtol=0)
    tokenizer = load_tokenizer(tmp_path / "start")
    add_mask_token(tokenizer, None)
    model.save_pretrained(tmp_path / "out", tokenizer=tokenizer)
    again = load_model(tmp_path / "out")
    assert type(again) is type(model) and again.info == model.info
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert mask_token_id(load_tokenizer(tmp_path / "out")) == known


def test_an_unused_token_as_mask_leaves_the_vocabulary_alone(tmp_path: Path) -> None:
    theirs = save(tmp_path, "Qwen2")
    unused = load_tokenizer(tmp_path).convert_tokens_to_ids("<|unused|>")
    model = convert(tmp_path, "<|unused|>")
    assert model.mask_token_id == unused and model.vocab_size == theirs.config.vocab_size
    others = [i for i in range(model.vocab_size) if i != unused]
    table = theirs.model.embed_tokens.weight
    torch.testing.assert_close(model.embedding.weight[unused], table[others].mean(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("token", ["q", "<|im_start|>", "<|im_end|>"])
def test_a_mask_token_in_use_is_refused(tmp_path: Path, token: str) -> None:
    save_tokenizer(tmp_path)
    with pytest.raises(UserError, match="mask_token.*in use"):
        add_mask_token(load_tokenizer(tmp_path), token)


def test_a_tokenizer_without_chat_template_gets_one_and_its_tokens(tmp_path: Path) -> None:
    """Whose rows are new, too: a Llama base model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(("<s>", "</s>", *pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")  # type: ignore[no-untyped-call]
    save(tmp_path, "Llama", vocab_size=len(vocabulary))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(tmp_path)
    add_mask_token(tokenizer, None)
    prompt, answer = chat_texts(tokenizer, "a", "b")
    assert len(tokenizer(prompt)["input_ids"]) < len(prompt) and answer.startswith("b")
    model = converted(str(tmp_path), tokenizer, 4)
    assert model.vocab_size >= len(tokenizer) and set(model.info.eos_token_ids) >= {1}
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.info.eos_token_ids


def test_shift_keeps_the_predicting_rows(tmp_path: Path) -> None:
    save(tmp_path / "qwen2", "Qwen2")
    model = convert(tmp_path / "qwen2", shift=True, attention="canvas")
    assert model.shifted and convertible(str(tmp_path / "qwen2"), True, "canvas") == "Dream"
    save(tmp_path / "llama", "Llama")
    with pytest.raises(UserError, match=r"convert\.shift.*llama"):
        convertible(str(tmp_path / "llama"), True, "blocks")


def test_shifted_blocks_of_one_token_decode_as_the_autoregressive_model(tmp_path: Path) -> None:
    """The pass over a finished block predicts the next token, and with blocks of one token there is no other."""
    theirs = save(tmp_path, "Qwen2")
    prompt, mask = [5, 6, 7], convert(tmp_path, shift=True).mask_token_id
    ours = Decoder(convert(tmp_path, shift=True))
    out = ours.generate([prompt], DecodeSettings(block_length=1, max_new_tokens=20, stop_token_ids=()))[0]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(20):
            logits = theirs(ids).logits[0, -1]
            assert logits.argmax() != mask
            ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    assert out.token_ids == ids[0, len(prompt) :].tolist() and out.num_forwards.total == 20


@pytest.mark.parametrize("name", NAMES)
def test_attention_over_the_canvas(tmp_path: Path, name: str) -> None:
    save(tmp_path / "start", name)
    model = convert(tmp_path / "start", attention="canvas")
    assert model.whole_canvas and not model.shifted
    model.save_pretrained(tmp_path / "out")
    assert type(load_model(tmp_path / "out")) is type(model)


def test_a_diffusion_model_is_no_start_of_a_conversion() -> None:
    golden = Path(__file__).parents[2] / "golden" / "sdar_tiny"
    with pytest.raises(UserError, match="model_type is 'sdar'"):
        convertible(str(golden), False, "blocks")


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "Llama")
    config = json.loads((tmp_path / "config.json").read_text())
    other = train_tokenizer(["the quick brown fox jumps over it all"] * 9, config["vocab_size"] + 40)
    assert len(other) > config["vocab_size"] + 3
    with pytest.raises(UserError, match=r"tokenizer\.path"):
        converted(str(tmp_path), other, 4)


@pytest.mark.parametrize("name", NAMES)
def test_learns_from_residual_inputs(tmp_path: Path, name: str) -> None:
    save(tmp_path, name)
    assert overfit(convert(tmp_path).float(), 250, 60) < 0.2


def test_blocks_grow_from_causal_attention() -> None:
    settings = TrainSettings(steps=40, batch_size=1)
    residual = ResidualSettings(source="none", dropout=0.0)
    ids = {"mask_token_id": 1, "pad_token_id": 0, "block_diffusion": True}
    collator = Collator(settings=settings, residual=residual, block_length=12, block_warmup=0.5, **ids)
    lengths = [collator.block_length_at(step) for step in range(40)]
    assert lengths[0] == 1 and lengths[20:] == [12] * 20 and lengths == sorted(lengths)
    assert set(lengths) == {1, 2, 3, 4, 6, 12}
    assert collator.block_length_at(None) == 12  # of validation
    at_once = replace(collator, block_warmup=0.0)
    assert {at_once.block_length_at(step) for step in range(40)} == {12}


# -- GGUF


@pytest.mark.skipif(not (find_spec("gguf") and find_spec("accelerate")), reason="gguf and accelerate are not installed")
def test_a_damaged_gguf_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCD_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(UserError, match=r"model\.gguf"):
        load_model(file)
    assert not list((tmp_path / "cache" / "gguf").glob("*/config.json"))
    with pytest.raises(UserError, match=r"nothing\.gguf"):
        load_tokenizer(tmp_path / "nothing.gguf")


def test_a_package_is_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_of_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_file("package://weights_of_a_model/a.gguf") == str(package / "a.gguf")
    assert package_file("/models/a.gguf") == "/models/a.gguf"
    with pytest.raises(UserError, match="no_such_package"):
        package_file("package://no_such_package/a.gguf")
    with pytest.raises(UserError, match="package"):
        package_file("package://weights_of_a_model.inner/a.gguf")
