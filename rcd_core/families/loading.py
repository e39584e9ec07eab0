"""load_model and new_model: one way to get a DiffusionModel, whatever its family.

Families are recognised from config.json. Only safetensors are read and no code of a checkpoint is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rcd_core.attention import BACKENDS
from rcd_core.errors import UserError
from rcd_core.families import llada, sdar
from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.config import ModelConfig

_FAMILIES = (sdar, llada)


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str = "sdpa",
) -> DiffusionModel:
    """Load an SDAR, LLaDA, Qwen3 or Llama checkpoint in eval mode.

    path: a directory, an s3:// or gs:// URI, or a hub id. dtype None keeps the checkpoint's own.
    Raises UserError for an unknown architecture, missing or pickled weights, or names that do not fit.
    """
    directory = checkpoint_directory(path)
    config = _read_json(directory / "config.json")
    family = _family_of(config, directory)
    backend = _backend(attention)
    weights = family.rename_weights(_read_weights(directory))
    backbone_config = family.backbone_config(config, directory)
    with torch.device("meta"):
        backbone = family.build_backbone(backbone_config)
    if backbone_config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    _check_names(backbone.state_dict().keys(), weights.keys(), directory)
    if dtype is None:
        dtype = weights["model.embed_tokens.weight"].dtype
    weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in weights.items()}
    backbone.load_state_dict(weights, assign=True)
    if backbone_config.tie_word_embeddings:
        backbone.tie_weights()
    # Rotary tables are not in the files; on the meta device they were never computed.
    backbone.model.rotary_emb = type(backbone.model.rotary_emb)(backbone_config).to(device)
    backbone.config._attn_implementation = backend
    generation_file = directory / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.exists() else {}
    info = family.checkpoint_info(config, generation)
    if not 0 <= info.mask_token_id < backbone_config.vocab_size:
        raise UserError(
            f"{directory}: mask_token_id {info.mask_token_id} lies outside the vocabulary of "
            f"{backbone_config.vocab_size}; set mask_token_id in config.json"
        )
    model: DiffusionModel = family.MODEL(backbone, info)
    return model.eval()


def new_model(
    start: ModelConfig, *, vocab_size: int, info: CheckpointInfo, seed: int, attention: str = "sdpa"
) -> DiffusionModel:
    """A model with fresh random fp32 weights: a pure function of (start, vocab_size, seed).

    PyTorch's own initialisation, with embeddings of standard deviation 1 (1/sqrt(D) where they are the head too), not
    transformers' 0.02 everywhere, which is meant for thousands of dimensions: small models train faster from it, and
    in the Sudoku demo RCD gained next to nothing from 0.02 (README, "What else we saw").
    """
    family = next(f for f in _FAMILIES if f.MODEL.family == start.family)
    config = family.fresh_config(start, vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = family.build_backbone(config).float()
        for module in backbone.modules():
            if isinstance(module, torch.nn.Linear):
                module.reset_parameters()
        std = start.hidden_size**-0.5 if start.tie_embeddings else 1.0
        torch.nn.init.normal_(backbone.model.embed_tokens.weight, std=std)
    backbone.config._attn_implementation = _backend(attention)
    model: DiffusionModel = family.MODEL(backbone, info)
    return model


def checkpoint_directory(path: str | Path) -> Path:
    """A local directory holding the checkpoint; URIs and hub ids are downloaded (json, safetensors, txt, jinja)."""
    text = str(path)
    if "://" in text:
        from rcd_core.storage import local_copy

        return local_copy(text)
    directory = Path(text)
    if directory.is_dir():
        if not (directory / "config.json").exists():
            raise UserError(f"{directory}: no config.json there; name the directory of a checkpoint")
        return directory
    if directory.is_absolute() or text.count("/") != 1:
        raise UserError(f"checkpoint {text!r} does not exist; give a directory, a URI or a hub id owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except Exception as error:
        raise UserError(
            f"checkpoint {text!r} is neither a local directory nor to be had from the hub: {error}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object")
    return content


def _family_of(config: dict[str, Any], directory: Path) -> Any:
    kind = config.get("model_type")
    for family in _FAMILIES:
        if kind in family.MODEL_TYPES:
            return family
    known = ", ".join(kind for family in _FAMILIES for kind in family.MODEL_TYPES)
    raise UserError(f"{directory}: model_type is {kind!r}; supported: {known}")


def _backend(attention: str) -> str:
    if attention not in BACKENDS:
        raise UserError(f"attention is {attention!r}; allowed: {', '.join(BACKENDS)}")
    return BACKENDS[attention]


def _read_weights(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_read_json(index)["weight_map"].values()))
        files = [directory / name for name in names]
        absent = [f.name for f in files if not f.exists()]
        if absent:
            raise UserError(f"{directory}: shards named in the index are missing: {', '.join(absent)}")
    if not files:
        pickled = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern)]
        why = f"only pickled weights ({', '.join(pickled)}), which can run code" if pickled else "no *.safetensors"
        raise UserError(f"{directory}: {why}; convert the checkpoint to safetensors")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights.update(load_file(file))
    return weights


def _check_names(wanted: Iterable[str], found: Iterable[str], directory: Path) -> None:
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or extra:
        raise UserError(f"{directory}: weights do not fit config.json; missing {missing[:4]}, unexpected {extra[:4]}")


__all__ = ["CheckpointInfo", "DiffusionModel", "ModelConfig", "checkpoint_directory", "load_model", "new_model"]
