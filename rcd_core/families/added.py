"""Small networks that a target trains along. Each has a file of its own next to the weights, so that the authors' code
reads the checkpoint unchanged."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rcd_core.alpha import LearnedAlpha
from rcd_core.errors import UserError
from rcd_core.loopholing import Loophole

# By attribute of DiffusionModel, which is None without the network.
FILES = {"learned_alpha": "rcd_alpha.safetensors", "loophole": "rcd_loophole.safetensors"}
_PREFIXES = tuple(f"{name}." for name in FILES)  # of their weights in a state dict of the whole model


def new_network(model: Any, name: str) -> nn.Module:
    """With its first weights, on the CPU in fp32."""
    return LearnedAlpha() if name == "learned_alpha" else Loophole(model.embedding.weight.shape[1])


def backbone_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a state dict of the whole model, without those of added networks."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(_PREFIXES)}


def take_added(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Give a model the added networks in a state dict of the whole model, without a copy."""
    for name in FILES:
        own = {n.removeprefix(f"{name}."): w for n, w in weights.items() if n.startswith(f"{name}.")}
        network = new_network(model, name) if own else None
        if network is not None:
            network.load_state_dict(own, assign=True)
        setattr(model, name, network)


def save_added(model: Any, directory: Path) -> None:
    """Write a file for each of the model's added networks, and delete files of an earlier save."""
    for name, file in FILES.items():
        network, partial = getattr(model, name), directory / f"{file}.partial"
        if network is None:
            (directory / file).unlink(missing_ok=True)
            continue
        save_file({n: w.detach().float().cpu().contiguous() for n, w in network.state_dict().items()}, partial)
        os.replace(partial, directory / file)


def load_added(model: Any, directory: Path, rcd: Mapping[str, Any]) -> None:
    """Give a model the added networks of a checkpoint, in fp32 on its device. rcd: the checkpoint's settings.

    Raises UserError for a damaged file, or a missing one that the settings need.
    """
    needed = {"learned_alpha": ("alpha", "learned"), "loophole": ("source", "loopholing")}
    for name, file in FILES.items():
        path, (key, value) = directory / file, needed[name]
        if not path.exists():
            if rcd.get(key) == value:
                raise UserError(
                    f"{directory}: config.json's rcd.{key} is {value!r} but {file} is missing; copy it as well"
                )
            continue
        network = new_network(model, name)
        try:
            network.load_state_dict(load_file(path))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(
                f"{path} is damaged or belongs to another network ({error}); download or write it again"
            ) from error
        setattr(model, name, network.to(model.device))
