"""Safetensors on disk: read file by file, written in shards with the index last.

At most one shard is in memory in addition to the model. Pickled weights are never opened.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rcd_core.errors import UserError
from rcd_core.families.added import FILES
from rcd_core.families.files import read_json

MAX_SHARD_BYTES = 5 * 10**9  # as Hugging Face's
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.partial)?")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NOT_WEIGHTS = ".rotary_emb.inv_freq"  # a table in old Llama exports; it follows from the config


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it; its data has not been read. pick: index of the part that is meant,
    which has this shape; () for all of it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pick: tuple[int | slice, ...] = ()


def list_weights(directory: Path) -> dict[str, StoredTensor]:
    """Name -> header entry of every tensor of a checkpoint.

    Raises UserError for missing, pickled, damaged or quantised files, a name in two files, and shards that contradict
    the index.
    """
    weight_map = _weight_map(directory)
    files = sorted(f for f in directory.glob("*.safetensors") if f.name not in FILES.values())
    if (directory / SINGLE).exists():  # before the index, as transformers does
        files, weight_map = [directory / SINGLE], None
    elif weight_map is not None:
        files = [directory / name for name in sorted(set(weight_map.values()))]
        absent = [f.name for f in files if not f.exists()]
        if absent:
            raise UserError(f"{directory}: shards named in the index are missing: {', '.join(absent)}")
    if not files:
        pickled = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(directory.glob(pattern))]
        why = f"only pickled weights ({', '.join(pickled)}), which can run code" if pickled else "no *.safetensors"
        raise UserError(f"{directory}: {why}; convert the checkpoint to safetensors")
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for entry in _header(file):
            if entry.name in stored:
                first = stored[entry.name].file.name
                raise UserError(f"{file}: {entry.name} is also in {first}; remove the file that is not the model's")
            stored[entry.name] = entry
    if weight_map is not None:
        _check_index(directory, weight_map, stored)
    return {name: entry for name, entry in stored.items() if not name.endswith(_NOT_WEIGHTS)}


def read_weights(
    stored: Mapping[str, StoredTensor],
    device: str | torch.device,
    dtype: torch.dtype,
    part: Callable[[str], tuple[slice, ...]] = lambda key: (),
) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, tensor on `device` in `dtype`) for each entry, with one file open at a time.

    On the CPU a tensor that needs no cast is a private mapping of the file: pages are loaded when touched.
    part: index of what is wanted of a tensor; nothing else of it is read.
    """
    by_file: dict[Path, list[str]] = {}
    for key, entry in stored.items():
        by_file.setdefault(entry.file, []).append(key)
    for file, keys in by_file.items():
        with safe_open(file, framework="pt") as content:
            for key in keys:
                name, pick, index = stored[key].name, stored[key].pick, part(key)
                if pick:
                    tensor = content.get_slice(name)[pick].view(stored[key].shape)[index or ...]
                else:
                    tensor = content.get_slice(name)[index] if index else content.get_tensor(name)
                yield key, tensor.to(device=device, dtype=dtype)


def write_weights(directory: Path, weights: Mapping[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write model.safetensors, or shards of at most max_shard_bytes (larger tensors get a shard each) and their index.

    Files are replaced atomically, so a model mapped from the same directory stays intact. Files of earlier saves,
    finished or not, are removed. Raises UserError for max_shard_bytes below 1.
    """
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in weights.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SINGLE]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: weights[name].detach().cpu().contiguous() for name in names}
        partial = directory / f"{file}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, directory / file)
    (directory / INDEX).unlink(missing_ok=True)
    for old in directory.glob("model*.safetensors*"):
        if _OURS.fullmatch(old.name) and old.name not in files:
            old.unlink()
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in weights.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        write_json(directory / INDEX, index)


def write_json(path: Path, value: Any) -> None:
    """Write JSON as Hugging Face does, atomically."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _weight_map(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX
    if not path.exists():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map; is the download complete?")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{path}: {name} is in {file!r}; it must be a .safetensors file of the same directory")
    return weight_map


def _header(file: Path) -> list[StoredTensor]:
    try:
        with safe_open(file, framework="pt") as content:
            entries = [(name, content.get_slice(name)) for name in content.keys()]  # noqa: SIM118 (not a mapping)
            headers = [(name, tuple(entry.get_shape()), entry.get_dtype()) for name, entry in entries]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or incomplete ({error}); download or write it again") from error
    for name, _, kind in headers:
        if kind not in _DTYPES:
            raise UserError(f"{file}: {name} is {kind}; supported: {', '.join(_DTYPES)}, no quantised weights")
    return [StoredTensor(file, name, shape, _DTYPES[kind]) for name, shape, kind in headers]


def _check_index(directory: Path, weight_map: dict[str, str], stored: dict[str, StoredTensor]) -> None:
    for name, file in weight_map.items():
        if name not in stored or stored[name].file.name != file:
            raise UserError(f"{directory / file}: {name} is missing, but {INDEX} lists it; download both again")
    for name, entry in stored.items():
        if name not in weight_map:
            raise UserError(f"{entry.file}: {name} is not listed in {INDEX}; download both again")
