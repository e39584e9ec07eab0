"""Checkpoints that would load as another model than their files describe: adapters, quantised weights, vocabularies
of different sizes. Each is refused in one message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rcd_core.errors import UserError
from rcd_core.families.files import read_json

_ADAPTER_CONFIG = "adapter_config.json"  # PEFT's
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_QUANTISATION_FIELDS = ("quantization_config", "compression_config")
_QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # AutoGPTQ, AWQ, ModelOpt


def refuse_adapter(directory: Path) -> None:
    """Raise UserError for an adapter such as LoRA, also next to whole weights: transformers would apply it to them."""
    present = [name for name in (_ADAPTER_CONFIG, *_ADAPTER_WEIGHTS) if (directory / name).exists()]
    if not present:
        return
    base = None
    if present[0] == _ADAPTER_CONFIG:
        base = read_json(directory / _ADAPTER_CONFIG).get("base_model_name_or_path")
    raise UserError(
        f"{directory}: {present[0]} makes this an adapter (LoRA) of {base or 'a base model that it does not name'}, "
        "not a checkpoint; merge it into its base (PEFT: merge_and_unload, save_pretrained) and give that directory. "
        f"If the weights here are merged already, remove {', '.join(present)}"
    )


def refuse_quantised(config: dict[str, Any], directory: Path) -> None:
    """Raise UserError if config.json or a file of its own describes quantised weights (GPTQ, AWQ, bitsandbytes ...)."""
    described = {f"config.json's {name}": config.get(name) for name in _QUANTISATION_FIELDS}
    described |= {name: read_json(directory / name) for name in _QUANTISATION_FILES if (directory / name).exists()}
    for name, value in described.items():
        if value:
            raise UserError(
                f"{directory}: {name} describes quantised weights ({json.dumps(value)[:120]}); use the checkpoint that "
                "they were quantised from"
            )


def check_vocabulary(config: dict[str, Any], vocab_size: int, num_rows: int, directory: Path) -> None:
    """Raise UserError if config.json, the embedding (num_rows) and the tokenizer contradict each other.

    vocab_size: the embedding's rows by config.json. A smaller tokenizer is usual, because embeddings are padded.
    """
    if num_rows != vocab_size:
        name = "embedding_size" if config.get("embedding_size") else "vocab_size"
        raise UserError(
            f"{directory}: config.json's {name} is {vocab_size}, but the embedding has {num_rows} rows; one of the two "
            "belongs to another model"
        )
    largest = max(_tokens(directory), default=None)
    if largest is not None and largest[0] >= vocab_size:
        index, token, file = largest
        raise UserError(
            f"{directory}: {file} gives token {token!r} the id {index}, but the embedding has {vocab_size} rows "
            "(vocab_size of config.json); use the model's own tokenizer, or resize the embedding"
        )
    declared, rows = config.get("vocab_size"), config.get("embedding_size")  # LLaDA pads the latter
    if isinstance(declared, int) and isinstance(rows, int) and 0 < rows < declared:
        raise UserError(
            f"{directory}: config.json's vocab_size is {declared}, but embedding_size is {rows}; the embedding needs a "
            "row for each token"
        )


def _tokens(directory: Path) -> Iterator[tuple[int, str, str]]:
    """(id, token, file) of the tokens that a tokenizer's files list, from each file the largest id only."""
    path = directory / "tokenizer.json"
    if path.exists():
        content = read_json(path)
        model = content.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, list):  # Unigram: [token, score], the id is the place
            vocabulary = {str(entry[0]): i for i, entry in enumerate(vocabulary)}
        yield from _largest(vocabulary, path.name)
        added = content.get("added_tokens")
        yield from _largest({str(t.get("content")): t.get("id") for t in added or () if isinstance(t, dict)}, path.name)
    for name in ("vocab.json", "added_tokens.json"):
        if (directory / name).exists():
            yield from _largest(read_json(directory / name), name)
    path = directory / "tokenizer_config.json"
    if path.exists():
        added = read_json(path).get("added_tokens_decoder")
        if isinstance(added, dict):
            yield from _largest({str(token): int(i) for i, token in added.items() if i.isdecimal()}, path.name)


def _largest(vocabulary: Any, file: str) -> Iterator[tuple[int, str, str]]:
    ids = {token: i for token, i in vocabulary.items() if isinstance(i, int)} if isinstance(vocabulary, dict) else {}
    if ids:
        token = max(ids, key=ids.__getitem__)
        yield ids[token], token, file
