"""Which part of each weight a rank of tensor parallelism holds, and the layers that put the parts together.

    q, k, v, gate, up     rows: heads, columns of the MLP        no communication
    o, down               columns                                one sum over the ranks of their output
    embedding, head       rows: ids of the vocabulary            one sum of the embeddings; logits stay split
    norms, router, biases of o and down                          whole on every rank
    experts               each one's columns, as of an MLP       one sum of the whole mixture

Where there are more ranks than key/value heads, several ranks hold the same one. The embedding is split like the head,
although whole copies would save one of the 2 L + 1 sums of a pass with L layers: a copy takes as much memory as several
layers, and tied weights stay one tensor.

Shapes: H query heads, G key/value heads, F columns of the MLP, D width, V vocabulary, N ranks.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rcd_core.errors import UserError
from rcd_core.ops.ranks import Ranks

_ROWS, _COLUMNS = ("q_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
_KEY_HEADS, _VOCABULARY = ("k_proj", "v_proj"), ("embed_tokens", "lm_head")
_SHARED = "shared_expert_intermediate_size"  # of a configuration: LLaDA-MoE's option


def check_split(config: Any, size: int, where: Path) -> None:
    """Raises UserError if a network cannot be split over `size` ranks."""
    groups = config.num_key_value_heads
    counts = {"attention heads": config.num_attention_heads, "columns of the MLP": config.intermediate_size}
    if hasattr(config, "moe_intermediate_size"):
        counts["columns of an expert"] = config.moe_intermediate_size
    if shared := getattr(config, _SHARED, None):
        counts["columns of the shared expert"] = shared
    problems = [f"{count} {name}" for name, count in counts.items() if count % size]
    if groups % size and size % groups:
        problems.append(f"{groups} key/value heads")
    if config.vocab_size <= (size - 1) * -(-config.vocab_size // size):
        problems.append(f"{config.vocab_size} ids")
    if problems:
        raise UserError(
            f"tensor_parallel is {size}, which does not divide the {', '.join(problems)} of {where}; choose a divisor "
            "(of key/value heads: a divisor or a multiple)"
        )


def rank_config(config: Any, ranks: Ranks) -> Any:
    """The config of one rank's layers: its heads and its columns of the MLP. vocab_size stays."""
    local = copy.deepcopy(config)
    local.num_attention_heads //= ranks.size
    local.num_key_value_heads = max(1, config.num_key_value_heads // ranks.size)
    local.intermediate_size //= ranks.size
    if hasattr(config, "moe_intermediate_size"):
        local.moe_intermediate_size //= ranks.size
    if shared := getattr(config, _SHARED, None):
        setattr(local, _SHARED, shared // ranks.size)
    return local


def part_of(name: str, config: Any, ranks: Ranks) -> tuple[slice, ...]:
    """Index of the rank's part of a weight of the backbone; () for all of it. config: of the whole model."""
    if ranks.size == 1:
        return ()
    kind, leaf = name.split(".")[-2:]
    if kind in _VOCABULARY:
        ids = ranks.vocabulary(config.vocab_size)
        return (slice(ids.start, ids.stop),)
    if kind in _KEY_HEADS:
        groups = config.num_key_value_heads
        first, count = ranks.rank * groups // ranks.size, max(1, groups // ranks.size)
        return (slice(first * config.head_dim, (first + count) * config.head_dim),)
    if kind in _ROWS or (kind in _COLUMNS and leaf == "weight"):
        count = _columns(name, config) // ranks.size
        part = slice(ranks.rank * count, (ranks.rank + 1) * count)
        return (part,) if kind in _ROWS else (slice(None), part)
    return ()


def _columns(name: str, config: Any) -> int:
    """What is split of a projection: the numbers of all heads, or the columns of an MLP."""
    if ".self_attn." in name:
        return int(config.num_attention_heads * config.head_dim)
    if ".experts." in name:
        return int(config.moe_intermediate_size)
    if ".shared_expert." in name:
        return int(getattr(config, _SHARED))
    if ".shared_experts." in name:
        return int(config.moe_intermediate_size * config.n_shared_experts)
    return int(config.intermediate_size)


def split_backbone(backbone_class: Any, config: Any, ranks: Ranks) -> Any:
    """The backbone of one rank, on the meta device."""
    local = rank_config(config, ranks)
    with torch.device("meta"):
        backbone = backbone_class(local)
        for name, module in list(backbone.named_modules()):
            if hasattr(module, "experts"):
                module.__class__ = _split_mixture(type(module))
                module.ranks = ranks
            elif name.split(".")[-1] in _COLUMNS and ".shared_expert" not in name:
                split = SplitLinear(module.in_features, module.out_features, module.bias is not None)
                split.ranks = ranks
                backbone.set_submodule(name, split)
        ids = ranks.vocabulary(config.vocab_size)
        embedding = SplitEmbedding(len(ids), config.hidden_size)
        embedding.ranks, embedding.num_embeddings, embedding.first = ranks, config.vocab_size, ids.start
        backbone.model.embed_tokens = embedding
        backbone.lm_head = nn.Linear(config.hidden_size, len(ids), bias=False)
    return backbone


def _split_mixture(kind: type[nn.Module]) -> type[nn.Module]:
    """A mixture of experts whose output, shared experts included, is summed over `ranks`."""

    class SplitMixture(kind):  # type: ignore[misc, valid-type]
        ranks: Ranks

        def forward(self, input: Tensor) -> Tensor:
            return self.ranks.sum(super().forward(input))

    return SplitMixture


class SplitLinear(nn.Linear):
    """(..., E / N) of this rank -> (..., D), summed over the ranks."""

    ranks: Ranks

    def forward(self, input: Tensor) -> Tensor:
        out = self.ranks.sum(F.linear(input, self.weight))
        return out if self.bias is None else out + self.bias


class SplitEmbedding(nn.Embedding):
    """ids (...) -> (..., D). weight (V / N, D): the rows from id `first` on. num_embeddings: V."""

    ranks: Ranks
    first: int

    def forward(self, input: Tensor) -> Tensor:
        at = input - self.first
        inside = (at >= 0) & (at < len(self.weight))
        rows = F.embedding(torch.where(inside, at, 0), self.weight)
        return self.ranks.sum(rows * inside[..., None])
