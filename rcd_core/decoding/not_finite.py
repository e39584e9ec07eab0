"""Where a pass first computes NaN or infinity, for the message of a request that failed by it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rcd_core.attention.layouts import block_causal
from rcd_core.decoding.sequence import LiveBlock
from rcd_core.families.base import DiffusionModel


def describe_not_finite(block: LiveBlock) -> str:
    """Runs the request's canvas once more, without cache and residual, and names the first layer that is not finite.
    Nothing of the engine changes. Call it before the canvas changes."""
    s, model, end = block.sequence, block.sequence.model, block.visible_end
    found: list[str] = []
    body = model.backbone.model
    named = [("the embedding", body.embed_tokens)]
    named += [(f"layer {i}", layer) for i, layer in enumerate(body.layers)]
    named += [("the last norm", body.norm)]
    hooks = [module.register_forward_hook(partial(_note, found, name)) for name, module in named]
    try:
        ids = torch.from_numpy(s.canvas[None, :end]).to(model.device)
        positions = torch.arange(end, device=model.device)[None]
        lengths = torch.tensor([end], device=model.device)
        length = torch.tensor([s.settings.block_length], device=model.device) if s.block_causal else None
        layout = block_causal(positions, lengths, end, length)
        hidden = model.hidden(model.embedding(ids), positions, layout)[0]
    finally:
        for hook in hooks:
            hook.remove()
    rows = model.predictors(block.masked_positions, block.masked_positions == 0)
    rows = torch.from_numpy(rows[rows < end]).to(model.device)
    if not found and not _finite(model.head(hidden[rows])):
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
