"""LoRA adapters in PEFT's format. A directory of an adapter stands for its base with the adapter merged into it, which
a node does once and keeps in its cache.

Adapters trained here have two files more: RCD's settings, and the shift of the mask token's embedding.

Shapes: O and I outputs and inputs of a linear layer, r rank, D width.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rcd_core.errors import UserError
from rcd_core.families.added import load_added, save_added
from rcd_core.families.files import CALIBRATION_FILE, read_json
from rcd_core.families.weights import write_json
from rcd_core.io import checksums
from rcd_core.io.hub import is_hub_id
from rcd_core.io.node_copy import cache_directory, digest, locked
from rcd_core.io.storage import is_uri
from rcd_core.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from rcd_core.families.base import DiffusionModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
SETTINGS, MASK_SHIFT = "rcd_adapter.json", "rcd_adapter.safetensors"
_PREFIX = "base_model.model."
# Options of PEFT that compute something else than W + s B A.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (None, False),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "trainable_token_indices": (None, []),
}


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds a safetensors adapter and no other weights."""
    others = set(directory.glob("*.safetensors")) - {directory / WEIGHTS, directory / MASK_SHIFT}
    whole = any(file.name.startswith(("model", "pytorch_model")) for file in others)
    return (directory / CONFIG).exists() and (directory / WEIGHTS).exists() and not whole


def merged_copy(directory: Path, load: Callable[[str], DiffusionModel]) -> Path:
    """The directory with the adapter's base, which `load` loads, and the adapter merged into it.

    Raises UserError if the base is not named or not there, and for adapters other than plain LoRA.
    """
    config = read_json(directory / CONFIG)
    for field, allowed in _PLAIN.items():
        if config.get(field) not in allowed:
            raise UserError(
                f"{directory}: {CONFIG}'s {field} is {config[field]!r}; only plain LoRA is merged here: merge it with "
                "PEFT (merge_and_unload, save_pretrained), and give that directory"
            )
    base = config.get("base_model_name_or_path")
    if not base or not (is_uri(base) or is_hub_id(base) or Path(base).exists()):
        raise UserError(
            f"{directory}: the adapter's base {base or 'is not named'} is not there; set base_model_name_or_path in "
            f"{CONFIG} to a directory, a URI or a hub id"
        )
    root = cache_directory("merged")
    facts = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in directory.iterdir())
    name = digest(str(directory.resolve()), facts, base)
    with locked(root / f"{name}.lock"):
        copy, partial = root / name, root / f"{name}.partial"
        if not copy.exists():
            shutil.rmtree(partial, ignore_errors=True)
            checksums.verify(directory, directory.glob("*.safetensors"))
            try:
                model = load(str(base))
            except UserError as error:
                raise UserError(f"{directory / CONFIG}: its base {base} cannot be loaded: {error}") from error
            _write_merged(directory, model, config, partial / directory.name)
            os.replace(partial, copy)
    return copy / directory.name


def _write_merged(directory: Path, model: DiffusionModel, config: Mapping[str, Any], destination: Path) -> None:
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(directory / WEIGHTS).items()}
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    shift = load_file(directory / MASK_SHIFT)["mask_shift"] if (directory / MASK_SHIFT).exists() else None
    merge(model, weights, scale, shift)
    if (directory / SETTINGS).exists():
        settings = read_json(directory / SETTINGS)
        model.info.rcd, model.info.block_length = settings["rcd"], settings["block_length"]
        load_added(model, directory, settings["rcd"])
    tokenizer = None
    with suppress(UserError):  # a base without one is its owner's choice
        tokenizer = load_tokenizer(directory if (directory / "tokenizer_config.json").exists() else model.name)
    model.save_pretrained(destination, tokenizer=tokenizer)
    if (directory / CALIBRATION_FILE).exists():
        shutil.copy(directory / CALIBRATION_FILE, destination)


@torch.no_grad()
def merge(model: DiffusionModel, weights: Mapping[str, Tensor], scale: float, mask_shift: Tensor | None) -> None:
    """W + scale B A in place, for each pair `<module>.lora_A.weight` (r, I), `<module>.lora_B.weight` (O, r) in the
    backbone's names; mask_shift (D,) is added to the mask token's embedding. Raises UserError for other weights."""
    parameters = dict(model.backbone.named_parameters())
    for name, down in weights.items():
        if ".lora_B." in name:
            continue
        module, marker, _ = name.partition(".lora_A.")
        up, target = weights.get(name.replace(".lora_A.", ".lora_B.")), parameters.get(f"{module}.weight")
        if not marker or up is None or target is None or (len(up), down.shape[1]) != tuple(target.shape):
            raise UserError(f"the adapter's weight {name} does not fit its base; is base_model_name_or_path right?")
        target += (scale * (up.float() @ down.float())).to(target)
    if mask_shift is not None:
        model.embedding.weight[model.mask_token_id] += mask_shift.to(model.embedding.weight)


def save_adapter(
    directory: Path, model: DiffusionModel, weights: Mapping[str, Tensor], config: Any, mask_shift: Tensor
) -> None:
    """Write an adapter that PEFT and `merged_copy` read. weights: as for `merge`. config: PEFT's LoraConfig, with the
    base. model: for its RCD settings and added networks."""
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    save_file({_PREFIX + name: tensor.contiguous() for name, tensor in weights.items()}, directory / WEIGHTS)
    save_file({"mask_shift": mask_shift.contiguous()}, directory / MASK_SHIFT)
    save_added(model, directory)
    checksums.write(directory, directory.glob("*.safetensors"))
    write_json(directory / SETTINGS, {"rcd": model.info.rcd, "block_length": model.info.block_length})
