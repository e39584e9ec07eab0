"""Residual Context Diffusion: the method, free of Ray. Public names load on first use, so the import stays light."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rcd_core.alpha import entropy_weight as entropy_weight
    from rcd_core.decode_settings import DecodeSettings as DecodeSettings
    from rcd_core.decoding.decoder import Decoder as Decoder
    from rcd_core.decoding.engine import Engine as Engine
    from rcd_core.decoding.generation import Generation as Generation
    from rcd_core.decoding.reference import (
        LocalReference as LocalReference,
    )
    from rcd_core.decoding.reference import (
        Reference as Reference,
    )
    from rcd_core.decoding.reference import (
        WarmStart as WarmStart,
    )
    from rcd_core.errors import UserError as UserError
    from rcd_core.families.base import DiffusionModel as DiffusionModel
    from rcd_core.families.config import ModelConfig as ModelConfig
    from rcd_core.families.loading import load_model as load_model
    from rcd_core.families.loading import new_model as new_model
    from rcd_core.residual import inject_residual as inject_residual
    from rcd_core.residual import soft_embedding as soft_embedding
    from rcd_core.signals import ReferenceSignals as ReferenceSignals
    from rcd_core.training.objective import TrainingBatch as TrainingBatch
    from rcd_core.training.objective import training_loss as training_loss

_HOMES = {
    "rcd_core.alpha": ("entropy_weight",),
    "rcd_core.decoding.decoder": ("Decoder",),
    "rcd_core.decoding.engine": ("Engine",),
    "rcd_core.decoding.reference": ("LocalReference", "Reference", "WarmStart"),
    "rcd_core.decoding.generation": ("Generation",),
    "rcd_core.decode_settings": ("DecodeSettings",),
    "rcd_core.errors": ("UserError",),
    "rcd_core.families.base": ("DiffusionModel",),
    "rcd_core.families.config": ("ModelConfig",),
    "rcd_core.families.loading": ("load_model", "new_model"),
    "rcd_core.residual": ("inject_residual", "soft_embedding"),
    "rcd_core.signals": ("ReferenceSignals",),
    "rcd_core.training.objective": ("TrainingBatch", "training_loss"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'rcd_core' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


__all__ = sorted(_HOME_OF)
