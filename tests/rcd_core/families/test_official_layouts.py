"""File layouts of the releases at their real widths: config fields, names, shards, ids.

One layer each; LLaDA-8B and the tied SDAR-1.7B with the whole vocabulary, the others with a shorter one. Names and
shapes of all layers are compared on the meta device with the published sizes. Tests write about 8 GB and remove them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rcd_core import load_model
from rcd_core.families.llada import LLaDAModel
from rcd_core.families.sdar import SDARModel
from tests.rcd_core.checkpoints import same_weights

SHARD_BYTES = 100 * 10**6

# model: hidden, layers, heads, intermediate; all have 8 key-value heads of width 128 and a vocabulary of 151936.
SDAR_SIZES = {
    "SDAR-1.7B-Chat": (2048, 28, 16, 6144),
    "SDAR-4B-Chat": (2560, 36, 32, 9728),
    "SDAR-8B-Chat": (4096, 36, 32, 12288),
}
SDAR_GENERATION = {
    "bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
    "temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "4.52.4",
}  # fmt: skip
LLADA_CONFIG = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 4096,
    "embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288,
    "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 32, "n_kv_heads": 32,
    "n_layers": 32, "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-5,
    "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.46.3", "use_cache": False, "vocab_size": 126464,
    "weight_tying": False,
}  # fmt: skip
# Fields that an export omits: they name code that we do not ship, or do not describe the network.
NOT_EXPORTED = {"auto_map", "bos_token_id", "transformers_version", "fuse_cross_entropy"}


def sdar_config(name: str, form: str = "published") -> dict[str, Any]:
    """form "training" has block_size and mask_token_id, "published" neither."""
    hidden, layers, heads, intermediate = SDAR_SIZES[name]
    config = {
        "architectures": ["SDARForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig",
                     "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"},
        "bos_token_id": 151643, "eos_token_id": 151643, "head_dim": 128, "hidden_act": "silu", "hidden_size": hidden,
        "initializer_range": 0.02, "intermediate_size": intermediate, "max_position_embeddings": 32768,
        "max_window_layers": layers, "model_type": "sdar", "num_attention_heads": heads, "num_hidden_layers": layers,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.52.4", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    }  # fmt: skip
    if form == "training":
        config |= {"block_size": 4, "mask_token_id": 151669, "fuse_cross_entropy": True}
    return config


def sdar_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as the released index lists them."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries, keys = (config[f"num_{kind}_heads"] * 128 for kind in ("attention", "key_value"))
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.k_norm.weight", (128,)
        yield f"{layer}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{layer}.self_attn.q_norm.weight", (128,)
        yield f"{layer}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (keys, hidden)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, hidden)


def llada_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner, vocabulary = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    yield "model.transformer.wte.weight", (vocabulary, width)
    for i in range(config["n_layers"]):
        block = f"model.transformer.blocks.{i}"
        yield f"{block}.attn_norm.weight", (width,)
        yield f"{block}.ff_norm.weight", (width,)
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            yield f"{block}.{name}.weight", (width, width)
        yield f"{block}.ff_proj.weight", (inner, width)
        yield f"{block}.up_proj.weight", (inner, width)
        yield f"{block}.ff_out.weight", (width, inner)
    yield "model.transformer.ln_f.weight", (width,)
    yield "model.transformer.ff_out.weight", (vocabulary, width)


def random_bits(shape: tuple[int, ...]) -> torch.Tensor:
    """bf16 with random sign and mantissa, magnitude 1/64 to 1/32. The first 1009 rows repeat, which is fast."""
    bits = torch.empty(min(shape[0], 1009), *shape[1:], dtype=torch.int16).random_(-0x8000, 0x8000)
    rows = bits.bitwise_and_(~0x7F80).bitwise_or_(0x3C80).view(torch.bfloat16)
    return rows[torch.arange(shape[0]) % len(rows)]


def release(
    directory: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], generation: dict[str, Any] | None
) -> Path:
    """A release as on Hugging Face: shards, index, JSON files and code."""
    directory.mkdir()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and num_bytes([*shards[-1].values(), shape]) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file({n: random_bits(s) for n, s in shard.items()}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": num_bytes(shapes.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    family = config["model_type"]
    for module in (f"modeling_{family}", f"configuration_{family}"):
        # A loader that trusts the checkpoint's code would import this, and create the file.
        (directory / f"{module}.py").write_text(f"open({str(directory / 'imported')!r}, 'w').close()\n")
    return directory


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A directory that is removed after its test, passed or failed."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def num_bytes(shapes: Any) -> int:
    return sum(2 * torch.Size(shape).numel() for shape in shapes)


def check(source: Path, directory: Path, ids: dict[str, Any], mask_token_id: int) -> None:
    """Load, compute, save, compare names, fields and bits, load again."""
    config = json.loads((source / "config.json").read_text())
    weight_map = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 1
    model = load_model(source)
    assert not (source / "imported").exists(), "code of the checkpoint was run"
    assert model.dtype == torch.bfloat16 and model.vocab_size == config["vocab_size"]
    assert {name: getattr(model.info, name) for name in ids} == ids
    assert model.mask_token_id == mask_token_id

    tokens = torch.tensor([[1, 17, mask_token_id, 5, mask_token_id]])
    with torch.no_grad():
        logits = model.logits(tokens)
    assert logits.shape == (1, 5, config["vocab_size"]) and torch.isfinite(logits).all()
    assert logits.std() > 0 and not torch.equal(logits[0, 2], logits[0, 4]), "two masks: positions must matter"

    model.save_pretrained(directory, max_shard_bytes=SHARD_BYTES)
    saved = json.loads((directory / "config.json").read_text())
    theirs = {name: value for name, value in config.items() if name not in NOT_EXPORTED}
    assert {name: saved[name] for name in theirs} == theirs
    assert saved["mask_token_id"] == mask_token_id and "rcd" not in saved
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weight_map.keys()
    assert index["metadata"]["total_size"] == sum(2 * t.numel() for t in model.official_files()[1].values())
    back = load_model(directory)
    assert back.info == model.info
    assert same_weights(model, back)
    with torch.no_grad():
        assert torch.equal(back.logits(tokens), logits)


SHORT = {"vocab_size": 20_000, "mask_token_id": 19_999}


@pytest.mark.parametrize(
    ("name", "form", "changes", "block_length"),
    [
        ("SDAR-1.7B-Chat", "training", SHORT, 4),
        pytest.param("SDAR-1.7B-Chat", "published", {"tie_word_embeddings": True}, 4, marks=pytest.mark.drill),
        ("SDAR-4B-Chat-b32", "published", SHORT, 32),
        ("RCD-SDAR-8B-b64-Thinking", "published", SHORT, 64),
    ],
    ids=["1.7B", "1.7B-tied", "4B-b32", "8B-b64"],
)
def test_sdar(name: str, form: str, changes: dict[str, Any], block_length: int, scratch: Path) -> None:
    sizes = next(known for known in SDAR_SIZES if known.split("-")[1] in name)
    config = sdar_config(sizes, form) | {"num_hidden_layers": 1, "max_window_layers": 1} | changes
    generation = dict(SDAR_GENERATION)
    if "vocab_size" in changes:  # ids inside the shorter vocabulary
        generation |= {"bos_token_id": 19_000, "eos_token_id": [19_001, 19_000], "pad_token_id": 19_000}
        config |= {"bos_token_id": 19_000, "eos_token_id": 19_000}
    source = release(scratch / name, config, dict(sdar_shapes(config)), generation)
    ids = {
        "eos_token_ids": tuple(generation["eos_token_id"]),
        "pad_token_id": generation["pad_token_id"],
        "block_length": block_length,
    }
    check(source, scratch / f"saved-{name}", ids, changes.get("mask_token_id", 151669))


@pytest.mark.drill  # gigabytes
def test_llada(scratch: Path) -> None:
    config = LLADA_CONFIG | {"n_layers": 1}
    source = release(scratch / "LLaDA-8B-Instruct", config, dict(llada_shapes(config)), generation=None)
    ids = {"eos_token_ids": (126081,), "pad_token_id": 126081, "block_length": 32, "turn_end_ids": (126348,)}
    check(source, scratch / "saved", ids, 126336)


@pytest.mark.parametrize(
    ("name", "total_size"),
    [
        ("SDAR-1.7B-Chat", None),
        ("SDAR-4B-Chat", 8_822_848_512),
        ("SDAR-8B-Chat", 16_381_470_720),
        ("LLaDA", 16_031_162_368),
    ],
)
def test_names_and_shapes_of_the_whole_model(name: str, total_size: int | None) -> None:
    """All layers, without computation; total_size as in the releases' indexes (LLaDA: twice its parameters)."""
    family: Any = LLaDAModel if name == "LLaDA" else SDARModel
    config = LLADA_CONFIG if name == "LLaDA" else sdar_config(name)
    expected = dict(llada_shapes(config) if name == "LLaDA" else sdar_shapes(config))
    with torch.device("meta"):
        backbone = family.backbone_class()(family.read_config(config, Path(name), has_head=True))
    shapes = {key: tuple(tensor.shape) for key, tensor in backbone.state_dict().items()}
    assert shapes == {family.backbone_name(key): shape for key, shape in expected.items()}
    assert total_size is None or num_bytes(expected.values()) == total_size
