"""Key/value cache in slots: one slot per running request, written in place.

A block's keys and values are written at their own positions in every pass and overwritten by the next, so there is
nothing to crop; how far a slot is valid is the request's knowledge, not the cache's. Slots rather than pages: shapes
stay static and a request's keys contiguous; pages pay off only when lengths differ widely (issue 6 measures).

Shapes: S slots, T positions (one more is the bin for padding), R rows of a pass, Q queries, K keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rcd_core.families.base import DiffusionModel


class SlotCache:
    def __init__(self, model: DiffusionModel, num_slots: int, num_positions: int) -> None:
        c = model.config
        shape = (num_slots, c.num_key_value_heads, num_positions + 1, c.head_dim)
        self.bin = num_positions
        self.keys = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(c.num_hidden_layers)]
        self.values = [torch.zeros_like(k) for k in self.keys]

    def view(self, slots: Tensor, positions: Tensor, num_keys: int) -> CacheView:
        """For one pass: rows use `slots` (R,), write at `positions` (R, Q) and read keys [0, num_keys)."""
        return CacheView(self, slots, positions, num_keys)


class CacheView:
    """What transformer layers see as `past_key_values` during one pass."""

    def __init__(self, cache: SlotCache, slots: Tensor, positions: Tensor, num_keys: int) -> None:
        self.cache, self.slots, self.positions, self.num_keys = cache, slots, positions, num_keys
        first = int(slots[0])
        consecutive = torch.equal(slots, torch.arange(first, first + len(slots), device=slots.device))
        # Neighbouring slots are read as a view; others are copied together for the pass.
        self.select: slice | Tensor = slice(first, first + len(slots)) if consecutive else slots

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.keys[layer_idx], self.cache.values[layer_idx]
        rows = self.slots[:, None]
        keys[rows, :, self.positions] = key.transpose(1, 2)
        values[rows, :, self.positions] = value.transpose(1, 2)
        return keys[self.select][:, :, : self.num_keys], values[self.select][:, :, : self.num_keys]
