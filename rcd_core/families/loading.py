"""load_model and new_model: one way to get a DiffusionModel, whatever its family.

Families are recognised from config.json. Only safetensors are read and no code of a checkpoint is ever run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from rcd_core.alpha import load_learned_alpha
from rcd_core.attention.backends import backend_key
from rcd_core.calibration.distance import CALIBRATION_FILE, SCHEMA_VERSION
from rcd_core.errors import UserError
from rcd_core.families import llada, sdar
from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.config import ModelConfig
from rcd_core.families.files import CheckpointFiles, read_json, released_name
from rcd_core.families.weights import StoredTensor, list_weights, read_weights
from rcd_core.io.node_copy import node_copy
from rcd_core.io.storage import is_uri

_FAMILIES = (sdar, llada)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str = "sdpa",
) -> DiffusionModel:
    """Load an SDAR, LLaDA, Qwen3 or Llama checkpoint in eval mode.

    path: a directory, an s3:// or gs:// URI, or a hub id. dtype None keeps the checkpoint's own.
    Raises UserError for an architecture that is not supported, and for weights that are missing, pickled, damaged or
    do not fit config.json.
    """
    directory = checkpoint_directory(path)
    config = read_json(directory / "config.json")
    family = _family_of(config, directory)
    backend = backend_key(attention, device)
    stored = _renamed(family, list_weights(directory))
    try:
        backbone_config = family.backbone_config(config, directory, _HEAD in stored)
    except (TypeError, StrictDataclassError) as error:  # a field of the wrong type, as transformers finds it
        raise UserError(f"{directory}: config.json does not describe a model: {error}") from error
    info = family.checkpoint_info(_files(directory, str(path), config))
    info.rcd = {**info.rcd, **calibration(directory)}
    _check_ids(info, backbone_config.vocab_size, directory)
    with torch.device("meta"):
        backbone = family.build_backbone(backbone_config)
    wanted = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    tied = backbone_config.tie_word_embeddings
    if tied:  # a head in the files is a copy, and transformers leaves it aside too
        del wanted[_HEAD]
        stored.pop(_HEAD, None)
    _check_fit(wanted, stored, directory)
    if dtype is None:
        dtype = stored[_EMBEDDING].dtype
    weights = dict(read_weights(stored, device, dtype))
    if tied:
        weights[_HEAD] = weights[_EMBEDDING]
    backbone.load_state_dict(weights, assign=True)
    if tied:
        backbone.tie_weights()
    # Rotary tables are not in the files; on the meta device they were never computed.
    backbone.model.rotary_emb = type(backbone.model.rotary_emb)(backbone_config).to(device)
    backbone.config._attn_implementation = backend
    model: DiffusionModel = family.MODEL(backbone, info)
    model.learned_alpha = load_learned_alpha(directory, device, required=info.rcd.get("alpha") == "learned")
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
    backbone.config._attn_implementation = backend_key(attention)
    model: DiffusionModel = family.MODEL(backbone, info)
    return model


def describe_checkpoint(path: str | Path) -> tuple[CheckpointInfo, int]:
    """What a checkpoint's json files say, its weights left aside: its info and how many positions it has."""
    directory = checkpoint_directory(path)
    config = read_json(directory / "config.json")
    family = _family_of(config, directory)
    positions = family.backbone_config(config, directory, True).max_position_embeddings
    info = family.checkpoint_info(_files(directory, str(path), config))
    info.rcd = {**info.rcd, **calibration(directory)}
    return info, int(positions)


def calibration(directory: Path) -> dict[str, Any]:
    """residual_temperature and calibration, the file's content, of a checkpoint that was calibrated (self_loop.py)."""
    path = directory / CALIBRATION_FILE
    if not path.exists():
        return {}
    found = read_json(path)
    version, value = found.get("schema_version"), found.get("residual_temperature")
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version is {version!r}, known is {SCHEMA_VERSION}; run `rcd calibrate` again")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
        raise UserError(f"{path}: residual_temperature is {value!r}; it must be a finite number above 0")
    return {"residual_temperature": float(value), "calibration": found}


def checkpoint_directory(path: str | Path) -> Path:
    """A local directory holding the checkpoint; URIs and hub ids are downloaded (json, safetensors, txt, jinja)."""
    text = str(path)
    if is_uri(text):
        return Path(node_copy(text))
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
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        where = "to be had from the hub"
        if offline:
            where = "in the hub's cache, and HF_HUB_OFFLINE is set, so that nothing is downloaded"
        raise UserError(f"checkpoint {text!r} is neither a local directory nor {where}: {error}") from error


def _files(directory: Path, path: str, config: dict[str, Any]) -> CheckpointFiles:
    generation = directory / "generation_config.json"
    return CheckpointFiles(directory, released_name(path), config, read_json(generation) if generation.exists() else {})


def _family_of(config: dict[str, Any], directory: Path) -> Any:
    kind = config.get("model_type")
    experts = [name for name in _EXPERTS if config.get(name)]
    if experts or "moe" in str(kind):
        why = f"model_type {kind!r}" + (f", {experts[0]} {config[experts[0]]}" if experts else "")
        raise UserError(f"{directory}: a mixture of experts ({why}) is not supported; use a dense checkpoint")
    if config.get("quantization_config"):
        raise UserError(f"{directory}: config.json has a quantization_config; use the checkpoint it was quantised from")
    for family in _FAMILIES:
        if kind in family.MODEL_TYPES:
            return family
    known = ", ".join(kind for family in _FAMILIES for kind in family.MODEL_TYPES)
    raise UserError(f"{directory}: model_type is {kind!r}; supported: {known}")


def _check_ids(info: CheckpointInfo, vocab_size: int, directory: Path) -> None:
    """Both are put into inputs; an eos outside the vocabulary is never met and does no harm."""
    for name, value in (("mask_token_id", info.mask_token_id), ("pad_token_id", info.pad_token_id)):
        if not 0 <= value < vocab_size:
            raise UserError(
                f"{directory}: {name} {value} lies outside the vocabulary of {vocab_size}; set {name} in config.json"
            )


def _renamed(family: Any, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Keyed by the backbone's names; UserError where two tensors of the files would be one of the model's."""
    renamed: dict[str, StoredTensor] = {}
    for name, entry in stored.items():
        first = renamed.setdefault(family.backbone_name(name), entry)
        if first is not entry:
            raise UserError(f"{entry.file}: {name} is the same weight as {first.name}; one of them must go")
    return renamed


def _check_fit(wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor], directory: Path) -> None:
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or extra:
        raise UserError(f"{directory}: weights do not fit config.json; missing {missing[:4]}, unexpected {extra[:4]}")
    for name, entry in stored.items():
        if entry.shape != wanted[name]:
            raise UserError(
                f"{entry.file}: {entry.name} is {entry.shape}, but by config.json it is {wanted[name]}; one of the two "
                "is of another model"
            )


__all__ = [
    "CheckpointInfo",
    "DiffusionModel",
    "ModelConfig",
    "checkpoint_directory",
    "describe_checkpoint",
    "load_model",
    "new_model",
]
