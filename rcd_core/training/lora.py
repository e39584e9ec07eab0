"""LoRA in training, by PEFT. The base is frozen; the adapters, a shift of the mask token's embedding and a learned
alpha are trained. With the adapters off the model is its base, which can be the reference without a second copy.

Shapes: D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rcd_core.errors import UserError
from rcd_core.families.adapters import merge, save_adapter
from rcd_core.families.base import DiffusionModel
from rcd_core.noise import seed_of
from rcd_core.training.settings import LoraSettings

_SHIFT = "mask_shift"


def require_peft() -> None:
    """Raise UserError if the package is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError("train.lora needs the package peft: pip install 'rcd-ray[lora]'") from error


def add_adapters(model: DiffusionModel, settings: LoraSettings, seed: int = 0) -> None:
    """Freeze the model, and add adapters to its linear layers in place. seed: of what PEFT draws. Raises UserError for
    an unknown layer."""
    require_peft()
    from peft import inject_adapter_in_model

    layers = model.backbone.model.layers
    names = {n.rpartition(".")[2] for n, module in layers.named_modules() if isinstance(module, nn.Linear)}
    if unknown := sorted(set(settings.modules) - names):
        raise UserError(f"train.lora.modules has {unknown[0]!r}; the linear layers are {', '.join(sorted(names))}")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU
        torch.manual_seed(seed_of(seed, "lora", "weights"))
        inject_adapter_in_model(peft_config(settings), model.backbone)
    model.mask_shift = nn.Parameter(torch.zeros_like(model.embedding.weight[0]))


def peft_config(settings: LoraSettings, base: str | None = None) -> Any:
    """PEFT's LoraConfig."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides by the rank
        lora_dropout=settings.dropout,
        target_modules=list(settings.modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


@contextmanager
def adapters_off(model: DiffusionModel) -> Iterator[None]:
    """The model as its base. Only for passes without gradient."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    shift, model.mask_shift = model.mask_shift, None
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters() would also set requires_grad
    try:
        yield
    finally:
        model.mask_shift = shift
        for layer in layers:
            layer._disable_adapters = False


def merged(base: DiffusionModel, weights: Mapping[str, Tensor], settings: LoraSettings) -> DiffusionModel:
    """The base, in place, with the weights that `train` returned."""
    merge(base, _pairs(weights), settings.alpha / settings.rank, weights[_SHIFT])
    return base


def export_adapter(
    directory: Path, model: DiffusionModel, weights: Mapping[str, Tensor], settings: LoraSettings, base: str | None
) -> None:
    """Write the weights that `train` returned in PEFT's format."""
    save_adapter(directory, model, _pairs(weights), peft_config(settings, base), weights[_SHIFT])


def _pairs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".default", ""): weight for name, weight in weights.items() if ".lora_" in name}
