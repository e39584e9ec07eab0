"""Where a pass first computes NaN or infinity, for the message of a request that failed by it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rcd_core.decoding.model_runner import BatchedForward
from rcd_core.decoding.sequence import Sequence
from rcd_core.families.base import DiffusionModel


def describe_not_finite(s: Sequence) -> str:
    """Runs the request's canvas once more, without cache and residual, and names the first layer that is not finite.
    Nothing of the engine changes. Call it before the canvas changes."""
    model = s.model
    row = s._row("denoise", 0, s.visible_end, s.visible_end, cached=False)._replace(residual=None)
    found: list[str] = []
    body = model.backbone.model
    named = [("the embedding", body.embed_tokens)]
    named += [(f"layer {i}", layer) for i, layer in enumerate(body.layers)]
    named += [("the last norm", body.norm)]
    hooks = [module.register_forward_hook(partial(_note, found, name)) for name, module in named]
    try:
        hidden = BatchedForward(model, 1, s.visible_end).hidden([row])
    finally:
        for hook in hooks:
            hook.remove()
    masked = torch.from_numpy(s.masked_positions[s.masked_positions < s.visible_end]).to(model.device)
    if not found and not _finite(model.head(hidden[0, masked])):
        found.append("the head" + _weights(model.lm_head_weight))
    place = found[0] if found else "its residual inputs"
    return (
        f"the predictions of {model.name} ({_dtype(model)}) are not finite, so no token can be committed; NaN or "
        f"infinity first appears in {place}. If the weights are sound, load the checkpoint in a wider dtype"
    )


def _note(found: list[str], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    if not found and not _finite(output):
        found.append(name + _weights(*module.parameters()))


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _weights(*weights: Tensor) -> str:
    return "" if all(_finite(w) for w in weights) else ", whose weights are not finite"


def _dtype(model: DiffusionModel) -> str:
    return str(model.dtype).removeprefix("torch.")
