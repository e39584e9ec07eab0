"""Mixtures of experts. Checkpoints have three tensors for each expert, the backbone two for all experts of a layer.

Shapes: E experts, F columns of an expert, D width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rcd_core.families.weights import StoredTensor

_ONE = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_ALL = re.compile(r"(.+\.mlp\.experts)\.(gate_up|gate|up|down)_proj(?:\.weight)?")


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts: `count` of them of `size` columns, of which a token meets `chosen`, and shared columns that
    every token meets. dense_layers: layers with an ordinary MLP."""

    count: int
    chosen: int
    size: int
    shared: int = 0
    dense_layers: int = 0

    @classmethod
    def of(cls, config: Any) -> Experts | None:
        """Of a Qwen3MoeConfig or Glm4MoeConfig; None for others."""
        size = getattr(config, "moe_intermediate_size", None)
        if size is None:
            return None
        if (routed := getattr(config, "n_routed_experts", None)) is not None:
            shared, dense = config.n_shared_experts * size, config.first_k_dense_replace
            chosen = config.num_experts_per_tok
            return cls(count=routed, chosen=chosen, size=size, shared=shared, dense_layers=dense)
        every, dense = config.decoder_sparse_step, set(config.mlp_only_layers or ())
        mixed = sum(i not in dense and (i + 1) % every == 0 for i in range(config.num_hidden_layers))
        return cls(
            count=config.num_experts,
            chosen=config.num_experts_per_tok,
            size=size,
            shared=getattr(config, "shared_expert_intermediate_size", None) or 0,
            dense_layers=config.num_hidden_layers - mixed,
        )

    @property
    def columns(self) -> int:
        return self.count * self.size + self.shared

    @property
    def active_columns(self) -> int:
        return self.chosen * self.size + self.shared

    def router(self, hidden_size: int) -> int:
        """Its parameters."""
        return self.count * hidden_size


def each_expert(name: str, entry: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """The weights of single experts in a stored tensor: itself, or E of (E, F, D), (E, 2 F, D) or (E, D, F)."""
    match = _ALL.fullmatch(name)
    if match is None or len(entry.shape) != 3:
        yield name, entry
        return
    prefix, kind = match.groups()
    count, rows, width = entry.shape
    parts = (("gate", slice(0, rows // 2)), ("up", slice(rows // 2, rows))) if kind == "gate_up" else ((kind, None),)
    for expert in range(count):
        for part, chosen in parts:
            shape = (rows // len(parts), width)
            pick = (expert,) if chosen is None else (expert, chosen)
            yield f"{prefix}.{expert}.{part}_proj.weight", replace(entry, shape=shape, pick=pick)


def single_shapes(expected: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a backbone's weights with each expert by itself."""
    single: dict[str, tuple[int, ...]] = {}
    for name, shape in expected.items():
        match = _ALL.fullmatch(name)
        if match is None:
            single[name] = shape
            continue
        halves = ("gate", "up") if match[2] == "gate_up" else (match[2],)
        one = (shape[1] // len(halves), shape[2])
        single |= {f"{match[1]}.{e}.{half}_proj.weight": one for e in range(shape[0]) for half in halves}
    return single


def stacked(weights: Iterable[tuple[str, Tensor]], num_experts: int) -> Iterator[tuple[str, Tensor]]:
    """The backbone's weights. Each expert's tensors are copied to their place as they come."""
    filled: dict[str, Tensor] = {}
    for name, tensor in weights:
        match = _ONE.fullmatch(name)
        if match is None:
            yield name, tensor
            continue
        prefix, expert, half = match[1], int(match[2]), match[3]
        rows, width = tensor.shape
        target = f"{prefix}.{'down' if half == 'down' else 'gate_up'}_proj"
        if target not in filled:
            filled[target] = tensor.new_empty(num_experts, rows * (1 if half == "down" else 2), width)
        filled[target][expert, rows * (half == "up") :][:rows] = tensor
    yield from filled.items()


def unstacked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As in the checkpoint; views of the backbone's weights."""
    single: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        match = _ALL.fullmatch(name)
        if match is None:
            single[name] = tensor
            continue
        halves = ("gate", "up") if match[2] == "gate_up" else (match[2],)
        for expert, of_expert in enumerate(tensor):
            for half, part in zip(halves, torch.chunk(of_expert, len(halves)), strict=True):
                single[f"{match[1]}.{expert}.{half}_proj.weight"] = part
    return single
