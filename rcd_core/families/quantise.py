"""Weight-only quantisation of a loaded model for decoding, by torchao: int8 and fp8 (with one scale per output), int4
(groups of 64, on GPUs). Weights are dequantised in each product; activations keep the model's dtype.

Only the linear layers are quantised. Embedding, head and norms stay as they are, so residual embeddings are exact, and
the experts of a mixture stay too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from rcd_core.decode_settings import Weights
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel

_GROUP = 64  # columns that share a scale in int4


def quantise(model: DiffusionModel, weights: Weights) -> None:
    """In place. Raises UserError if torchao, or its kernel for this device, is not there, and for a split model."""
    if weights == "full":
        return
    if model.ranks.size > 1:
        raise UserError(f"weights is {weights!r}, but the model is split over {model.ranks.size} ranks; use 'full'")
    try:
        from torchao.quantization import quantize_
    except ImportError as error:
        raise UserError(f"weights is {weights!r}, which needs torchao: pip install 'rcd-ray[quantise]'") from error
    model.requires_grad_(False)
    try:
        for layer in model.backbone.model.layers:
            quantize_(layer, _config(weights), filter_fn=_is_linear)
    except (ImportError, NotImplementedError) as error:  # no kernel; running out of memory stays what it is
        raise UserError(
            f"weights is {weights!r}, which torchao cannot run on {model.device} ({str(error).splitlines()[0]}); use "
            "int8 or full"
        ) from error


def is_quantised(weight: Tensor) -> bool:
    return type(weight.detach()).__module__.startswith("torchao.")  # other subclasses are stand-ins of plain tensors


def weight_bytes(model: DiffusionModel) -> int:
    """Of all parameters, as they are stored."""
    return sum(part.numel() * part.element_size() for p in model.parameters() for part in stored_tensors(p))


def stored_tensors(weight: Tensor) -> list[Tensor]:
    """The plain tensors of a weight: itself, or a quantised one's numbers and scales."""
    weight = weight.detach()
    if not is_quantised(weight):
        return [weight]
    parts, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]  # of tensor subclasses
    return [getattr(weight, name) for name in parts]


def _is_linear(module: nn.Module, _: str) -> bool:
    return isinstance(module, nn.Linear)


def _config(weights: Weights) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig

    made: dict[str, Callable[[], Any]] = {
        "int8": Int8WeightOnlyConfig,
        "fp8": Float8WeightOnlyConfig,
        "int4": lambda: Int4WeightOnlyConfig(group_size=_GROUP),
    }
    return made[weights]()
