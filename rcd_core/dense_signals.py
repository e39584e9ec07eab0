"""What sparse and dense signals have in common, and the dense ones: whole distributions, in memory only.

Shapes: N positions, V vocabulary, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from rcd_core.alpha import LearnedAlpha, alpha_from_statistics, entropy
from rcd_core.decode_settings import AlphaRule
from rcd_core.ops.tiles import tile_rows
from rcd_core.precision import at_least_fp32


class AlphaInputs(TypedDict, total=False):
    """What some rules need for alpha in addition to the prediction, as in `alpha_from_statistics`."""

    learned: LearnedAlpha | None
    groups: Tensor | None


class AnySignals(ABC):
    """What the sparse and the dense form have in common: N predictions that give alpha and delta."""

    @abstractmethod
    def uncertainty(self, vocab_size: int, rule: AlphaRule) -> tuple[Tensor, Tensor]:
        """(N,) entropies in nats and (N,) largest probabilities, both at the alpha temperature. The latter are 1 if the
        rule does not need them. Raises UserError if it does and they are unknown."""

    @abstractmethod
    def soft_embedding(self, embedding_weight: Tensor) -> Tensor:
        """Eq. 1: (V, D) table -> (N, D) delta, with gradient to the table."""

    @abstractmethod
    def top1(self) -> Tensor:
        """(N,) int64 ids of the most probable tokens."""

    def alpha(
        self,
        vocab_size: int,
        rule: AlphaRule = "normalized_entropy",
        alpha_scale: float | None = None,
        **more: Unpack[AlphaInputs],
    ) -> Tensor:
        """(N,) alpha in [0, 1] by Eq. 3 or another rule; arguments as in `alpha_from_statistics`."""
        return alpha_from_statistics(rule, *self.uncertainty(vocab_size, rule), vocab_size, alpha_scale, **more)


@dataclass(frozen=True)
class DenseSignals(AnySignals):
    """The exact counterpart: whole distributions of a few positions, in memory only. logits (N, V), fp32 or
    wider."""

    logits: Tensor
    alpha_temperature: float = 1.0
    delta_temperature: float = 1.0

    def uncertainty(self, vocab_size: int, rule: AlphaRule) -> tuple[Tensor, Tensor]:
        scaled = self.logits / self.alpha_temperature
        return entropy(scaled), torch.softmax(scaled, dim=-1).amax(-1)

    def soft_embedding(self, embedding_weight: Tensor) -> Tensor:
        return torch.softmax(self.logits / self.delta_temperature, dim=-1).to(embedding_weight.dtype) @ embedding_weight

    def top1(self) -> Tensor:
        return self.logits.argmax(-1)

    def __getitem__(self, index: slice | Tensor) -> DenseSignals:
        return replace(self, logits=self.logits[index])

    def __len__(self) -> int:
        return self.logits.shape[0]


@dataclass(frozen=True)
class HiddenSignals(AnySignals):
    """The same, of which only a tile exists at a time: final hidden states (N, D) of a reference, and its head, (n, D)
    -> (n, V) logits. Each method runs the head; residual_state runs it once for both alpha and delta."""

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    vocab_size: int
    alpha_temperature: float = 1.0
    delta_temperature: float = 1.0

    def tiles(self) -> Iterator[DenseSignals]:
        """At least one, of at most 64 MiB of fp32 logits or one position."""
        for rows in torch.split(self.hidden, tile_rows(self.vocab_size, self.hidden.device)):
            with torch.no_grad():
                logits = at_least_fp32(self.head(rows))
            yield DenseSignals(logits, self.alpha_temperature, self.delta_temperature)

    def uncertainty(self, vocab_size: int, rule: AlphaRule) -> tuple[Tensor, Tensor]:
        entropies, confidences = zip(*(tile.uncertainty(vocab_size, rule) for tile in self.tiles()), strict=True)
        return torch.cat(entropies), torch.cat(confidences)

    def soft_embedding(self, embedding_weight: Tensor) -> Tensor:
        return torch.cat([tile.soft_embedding(embedding_weight) for tile in self.tiles()])

    def top1(self) -> Tensor:
        return torch.cat([tile.top1() for tile in self.tiles()])

    def __getitem__(self, index: slice | Tensor) -> HiddenSignals:
        return replace(self, hidden=self.hidden[index])

    def __len__(self) -> int:
        return self.hidden.shape[0]
