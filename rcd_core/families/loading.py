"""load_model and new_model: DiffusionModels of any family, which config.json's model_type decides.

Only safetensors are read, and no code of a checkpoint is executed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from rcd_core.attention.backends import backend_key
from rcd_core.decode_settings import Weights
from rcd_core.errors import UserError
from rcd_core.families.a2d import A2D_FAMILIES
from rcd_core.families.adapters import is_adapter, merged_copy
from rcd_core.families.added import FILES, load_added
from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.config import ModelConfig
from rcd_core.families.dream import DreamModel
from rcd_core.families.experts import Experts, single_shapes, stacked
from rcd_core.families.fast_dllm import FastDLLMModel
from rcd_core.families.files import CheckpointFiles, released_name
from rcd_core.families.llada import LLaDAModel
from rcd_core.families.llada2 import LLaDA2Model
from rcd_core.families.llada_moe import LLaDAMoEModel
from rcd_core.families.quantise import quantise
from rcd_core.families.sdar import SDARModel
from rcd_core.families.sdar_moe import SDARMoEModel
from rcd_core.families.split import check_split, part_of, split_backbone
from rcd_core.families.unsupported import check_vocabulary, refuse_adapter, refuse_quantised
from rcd_core.families.weights import StoredTensor, list_weights, read_weights
from rcd_core.io import checksums
from rcd_core.io.gguf import is_gguf, unpacked
from rcd_core.io.hub import CHECKPOINT_FILES, is_hub_id, snapshot
from rcd_core.io.node_copy import node_copy
from rcd_core.io.storage import is_uri
from rcd_core.ops.ranks import ALONE, Ranks

# The first one of a `family` is the one that is made from sizes (new_model).
_FAMILIES: tuple[type[DiffusionModel], ...] = (
    *(SDARModel, LLaDAModel, SDARMoEModel, LLaDAMoEModel, LLaDA2Model, DreamModel, FastDLLMModel),
    *A2D_FAMILIES,
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TIED = "tie_word_embeddings (LLaDA: weight_tying)"


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    attention: str = "auto",
    ranks: Ranks = ALONE,
    fields: Mapping[str, Any] | None = None,
    weights: Weights = "full",
) -> DiffusionModel:
    """Load a checkpoint of any family (README.md lists them) in eval mode.

    path: a directory, a GGUF file, an s3:// or gs:// URI, or a hub id owner/name[@revision]. dtype None: the
    checkpoint's. fields: of config.json, used instead of those in the file (convert.py).
    attention: of training (attention/backends.py) and of the engines that decode the model (paged_backends.py).
    ranks: load one rank's part of the weights (families/split.py), and read nothing else of the files. weights: how
    the layers are kept, for decoding only (quantise.py).
    Raises UserError for an unsupported architecture, and for weights that are missing, pickled, damaged (see
    io/checksums.py) or do not fit config.json.
    """
    directory = checkpoint_directory(path)
    files = CheckpointFiles.read(directory, str(path))
    files.config.update(fields or {})
    family = family_of(files.config, directory)
    backend = backend_key(attention, device)
    stored = _rename(family, list_weights(directory), files.config)
    try:
        config = family.read_config(files.config, directory, _HEAD in stored)
    except (TypeError, StrictDataclassError) as error:  # transformers' error for a field of the wrong type
        raise UserError(f"{directory}: config.json does not describe a model: {error}") from error
    info = family.read_info(files)
    num_rows = stored[_EMBEDDING].shape[0] if _EMBEDDING in stored else config.vocab_size
    check_vocabulary(files.config, config.vocab_size, num_rows, directory)
    _check_ids(info, config.vocab_size, directory)
    with torch.device("meta"):
        backbone = family.backbone_class()(config)
    expected = single_shapes({name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()})
    if config.tie_word_embeddings and _HEAD not in stored:
        del expected[_HEAD]
    _check_fit(expected, stored, directory)
    if ranks.rank == 0:  # the other ranks read the same files
        added = (directory / name for name in FILES.values())
        checksums.verify(directory, {*(tensor.file for tensor in stored.values()), *filter(Path.exists, added)})
    if dtype is None:
        dtype = stored[_EMBEDDING].dtype
    whole = config
    if ranks.size > 1:
        check_split(whole, ranks.size, directory)
        backbone = split_backbone(family.backbone_class(), whole, ranks)
        config = backbone.config
    read = read_weights(stored, device, dtype, lambda name: part_of(name, whole, ranks))
    experts = Experts.of(whole)
    tensors = dict(stacked(read, experts.count) if experts else read)
    if config.tie_word_embeddings:
        config.tie_word_embeddings = whole.tie_word_embeddings = _is_copy(tensors, directory)
    if config.tie_word_embeddings:
        tensors[_HEAD] = tensors[_EMBEDDING]
    backbone.load_state_dict(tensors, assign=True)
    if config.tie_word_embeddings:
        backbone.tie_weights()
    # Rotary tables are not in the files and were not computed on the meta device.
    backbone.model.rotary_emb = type(backbone.model.rotary_emb)(config).to(device)
    backbone.config._attn_implementation = backend
    if experts and dtype == torch.float64:  # which PyTorch's grouped products do not take
        backbone.config._experts_implementation = "eager"
    model = family(backbone, info)
    model.name, model.attention = str(path), attention
    model.ranks, model.whole_config = ranks, whole
    load_added(model, directory, info.rcd)
    quantise(model, weights)
    return model.eval()


def new_model(
    start: ModelConfig, *, vocab_size: int, info: CheckpointInfo, seed: int, attention: str = "auto"
) -> DiffusionModel:
    """A model with fresh random fp32 weights: a pure function of (start, vocab_size, seed).

    PyTorch's initialisation, with embeddings of standard deviation 1 (tied: 1/sqrt(D)). transformers' 0.02 everywhere
    is meant for widths of thousands: small models train slower from it and gain less from RCD.
    """
    family = next(f for f in _FAMILIES if f.family == start.family)
    config = family.new_config(start, vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = family.backbone_class()(config).float()
        for module in backbone.modules():
            if isinstance(module, torch.nn.Linear):
                module.reset_parameters()
        std = start.hidden_size**-0.5 if start.tie_embeddings else 1.0
        torch.nn.init.normal_(backbone.model.embed_tokens.weight, std=std)
    backbone.config._attn_implementation = backend_key(attention)
    model = family(backbone, info)
    model.attention = attention
    return model


def describe_checkpoint(path: str | Path) -> tuple[CheckpointInfo, int]:
    """(info, number of positions) of a checkpoint from its JSON files; weights are not read."""
    directory = checkpoint_directory(path)
    files = CheckpointFiles.read(directory, str(path))
    family = family_of(files.config, directory)
    return family.read_info(files), int(family.read_config(files.config, directory, True).max_position_embeddings)


def checkpoint_directory(path: str | Path) -> Path:
    """A local directory with the checkpoint. URIs and hub ids are downloaded (json, safetensors, txt, jinja), adapters
    (LoRA) merged into their base.

    Raises UserError if there is none, and for an adapter that cannot be merged.
    """
    directory = _directory(str(path))
    if is_adapter(directory):
        directory = merged_copy(directory, load_model)
    refuse_adapter(directory)
    if not (directory / "config.json").exists():
        raise UserError(f"{directory}: no config.json there; give the directory of a checkpoint")
    return directory


def _directory(text: str) -> Path:
    if is_gguf(text):
        return unpacked(Path(text))
    if is_uri(text):
        return Path(node_copy(text))
    directory = Path(text)
    if directory.is_dir():
        return directory
    if not is_hub_id(text):
        raise UserError(
            f"checkpoint {text!r} does not exist; give a directory, a URI or a hub id owner/name[@revision]"
        )
    return snapshot(text, CHECKPOINT_FILES)


def family_of(config: dict[str, Any], directory: Path) -> type[DiffusionModel]:
    """The model class for a config.json. Raises UserError for unsupported architectures and quantised weights."""
    kind = config.get("model_type")
    experts = [f"{name} {config[name]}" for name in _EXPERTS if config.get(name)]
    refuse_quantised(config, directory)
    for family in _FAMILIES:
        if family.matches(config, bool(experts), released_name(str(directory))):
            return family
    dense, mixed = (
        ", ".join(dict.fromkeys(kind for f in _FAMILIES if f.has_experts == having for kind in f.model_types))
        for having in (False, True)
    )
    what = f"{kind!r} with {experts[0]}" if experts else repr(kind)
    raise UserError(f"{directory}: model_type is {what}; supported: {dense}; with experts: {mixed}")


def _check_ids(info: CheckpointInfo, vocab_size: int, directory: Path) -> None:
    """Mask and padding ids are put into inputs. An eos id outside the vocabulary is never generated and is harmless."""
    for name, value in (("mask_token_id", info.mask_token_id), ("pad_token_id", info.pad_token_id)):
        if not 0 <= value < vocab_size:
            raise UserError(
                f"{directory}: {name} {value} lies outside the vocabulary of {vocab_size}; set {name} in config.json"
            )


def _rename(
    family: type[DiffusionModel], stored: Mapping[str, StoredTensor], config: dict[str, Any]
) -> dict[str, StoredTensor]:
    """Keyed by the backbone's names. Raises UserError if two stored tensors map to one weight."""
    renamed: dict[str, StoredTensor] = {}
    for entry in stored.values():
        for name, part in family.expand(entry, config):
            first = renamed.setdefault(name, part)
            if first is not part:
                raise UserError(f"{entry.file}: {entry.name} is the same weight as {first.name}; remove one of them")
    return renamed


def _is_copy(weights: Mapping[str, Tensor], directory: Path) -> bool:
    """Whether the head, which config.json ties, is the embedding: absent or equal. Warns if it is another one."""
    if _HEAD not in weights or torch.equal(weights[_HEAD], weights[_EMBEDDING]):
        return True
    warnings.warn(
        f"{directory}: config.json ties the head to the embedding ({_TIED}), but {_HEAD} in the files differs from it; "
        f"the head of the files is used. Set {_TIED} to false, or remove the head from the files",
        stacklevel=3,
    )
    return False


def _check_fit(expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor], directory: Path) -> None:
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing == [_HEAD] and not extra:
        raise UserError(
            f"{directory}: {_HEAD} is missing, and config.json does not tie it to the embedding; set {_TIED} to true "
            "if the embedding is the head, else complete the download"
        )
    if missing or extra:
        raise UserError(f"{directory}: weights do not fit config.json; missing {missing[:4]}, unexpected {extra[:4]}")
    for name, entry in stored.items():
        if entry.shape != expected[name]:
            raise UserError(
                f"{entry.file}: {entry.name} is {entry.shape}, but config.json implies {expected[name]}; "
                "one of the two belongs to another model"
            )
