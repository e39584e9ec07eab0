"""The residual state of all requests: alpha and delta of the masked positions of the block each is decoding.

Kept in place by slot, so that a pass reads and writes it by index, whoever takes part: no tensors are made per request,
and shapes stay the same from pass to pass.

Shapes: S slots, W places of a slot (positions counted from its block's start), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class ResidualState:
    """alpha (S W + 2,) fp32, delta (S W + 2, D) in the model's dtype. Two more places serve passes of fixed shape:
    `nothing`, always alpha 0, for tokens without a residual, and `nowhere` for results nobody wants."""

    def __init__(self, num_slots: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_slots, self.width = num_slots, width
        self.dtype, self.device = dtype, device
        self._alpha: Tensor | None = None
        self._delta: Tensor | None = None
        self.reach = 0

    @property
    def nothing(self) -> int:
        return self.num_slots * self.reach

    @property
    def nowhere(self) -> int:
        return self.num_slots * self.reach + 1

    @property
    def alpha(self) -> Tensor:
        assert self._alpha is not None
        return self._alpha

    @property
    def delta(self) -> Tensor:
        assert self._delta is not None
        return self._delta

    def reserve(self, places: int) -> bool:
        """Room for so many positions of each slot; what is there stays. True if the tensors were made anew."""
        if places <= self.reach:
            return False
        alpha = torch.zeros(self.num_slots * places + 2, device=self.device)
        delta = torch.zeros(len(alpha), self.width, dtype=self.dtype, device=self.device)
        if self._alpha is not None:
            for new, old in ((alpha, self.alpha), (delta, self.delta)):
                shape = (self.num_slots, places, *new.shape[1:])
                new[:-2].view(shape)[:, : self.reach] = old[:-2].view(self.num_slots, self.reach, *old.shape[1:])
        self._alpha, self._delta, self.reach = alpha, delta, places
        return True

    def blend(self, embeds: Tensor, places: Tensor) -> Tensor:
        """Eq. 2: (R, Q, D) token embeddings, (R, Q) places -> inputs. Where alpha is 0 they are the embeddings, bit
        for bit."""
        alpha = self.alpha[places].to(embeds.dtype).unsqueeze(-1)
        return torch.lerp(embeds, F.embedding(places, self.delta), alpha)

    def write(self, places: Tensor, alpha: Tensor, delta: Tensor) -> None:
        """(N,) places; alpha (N,), delta (N, D)."""
        self.alpha.index_copy_(0, places, alpha.to(self.alpha.dtype))
        self.delta.index_copy_(0, places, delta.to(self.delta.dtype))
