"""Key/value cache in slots, one per running request, and reuse of prefixes that old slots still hold.

Every pass writes the block's keys and values at their own positions, over those of the pass before, so nothing has to
be cropped. Slots instead of pages: the rows of a pass are one view of the cache with static shapes, which attention
reads without a gather. Pages save memory only if lengths differ widely, and need their own kernels.
Positions come before heads, as flash-attn's cache kernel expects, and so that one copy writes the tokens of a pass.

Shapes: S slots, T positions of a slot (and one more for padding), R rows of a pass, Q queries, K keys, G key/value
heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.families.base import DiffusionModel

Ids = NDArray[np.int64]


def bytes_per_position(model: DiffusionModel) -> int:
    """Bytes of keys and values of one position in all layers. An engine holds max_batch x max_length positions."""
    c = model.config
    return 2 * int(c.num_hidden_layers * c.num_key_value_heads * c.head_dim) * model.dtype.itemsize


class SlotCache:
    def __init__(self, model: DiffusionModel, num_slots: int, num_positions: int) -> None:
        c = model.config
        shape = (num_slots, num_positions + 1, c.num_key_value_heads, c.head_dim)
        self.keys = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(c.num_hidden_layers)]
        self.values = [torch.zeros_like(k) for k in self.keys]

    def copy(self, source: int, destination: int, length: int) -> None:
        """Copy positions [0, length) of one slot to another."""
        for tensor in (*self.keys, *self.values):
            tensor[destination, :length] = tensor[source, :length]

    def clear(self, slot: int) -> None:
        """Forget keys and values that are not finite: a masked one still has weight 0, and 0 * NaN is NaN."""
        for tensor in (*self.keys, *self.values):
            tensor[slot].zero_()


class CacheView:
    """The `past_key_values` of transformer layers during one pass.

    index (R Q,): slot x (T + 1) + position, where the tokens' keys and values are written. slots: of the rows, as a
    slice (read as a view), (R,) numbers (gathered), or None if attention finds them in the whole pool itself.
    num_keys: positions to read of each slot.
    """

    def __init__(self, cache: SlotCache, index: Tensor, slots: slice | Tensor | None, num_keys: int) -> None:
        self.cache, self.index, self.slots, self.num_keys = cache, index, slots, num_keys

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """(R, G, Q, d) each -> keys and values that the rows may see, (R, G, K, d), or the pools, (S, G, T + 1, d)."""
        visible = []
        for new, pool in ((key, self.cache.keys[layer_idx]), (value, self.cache.values[layer_idx])):
            tokens = new.transpose(1, 2).reshape(len(self.index), -1)
            pool.view(-1, tokens.shape[1]).index_copy_(0, self.index, tokens)
            read = pool if self.slots is None else pool[self.slots][:, : self.num_keys]
            visible.append(read.transpose(1, 2))
        return visible[0], visible[1]


@dataclass
class CachedPrefix:
    """A slot holds the exact keys and values of ids[:stored]. block_length is part of the key, because another block
    length is another attention layout."""

    block_length: int
    ids: Ids
    stored: int = 0


class Slots:
    """Allocation of slots. A released slot keeps its prefix until it is taken again, least recently used first."""

    def __init__(self, num_slots: int) -> None:
        self.free = list(range(num_slots))  # in order of release
        self.prefixes: dict[int, CachedPrefix] = {}

    def take(self, ids: Ids, block_length: int, num_shared: int) -> tuple[int, int, int]:
        """Take a slot for a request with these ids -> (slot, source, reused): slot `source`, which may be the same,
        already holds ids[:reused], whole blocks of ids[:num_shared]. reused 0: nothing to copy."""
        source, reused = -1, 0
        for slot, prefix in self.prefixes.items() if num_shared else ():
            if prefix.block_length == block_length:
                length = min(prefix.stored, num_shared)
                different = np.flatnonzero(prefix.ids[:length] != ids[:length])
                length = int(different[0]) if len(different) else length
                length -= length % block_length
                # A free slot wins a tie, because it needs no copy.
                if length > reused or (length == reused > 0 and slot in self.free):
                    source, reused = slot, length
        slot = source if source in self.free else self.free[0]
        self.free.remove(slot)
        self.prefixes[slot] = CachedPrefix(block_length, ids, reused)
        return slot, source, reused

    def release(self, slot: int) -> None:
        self.free.append(slot)
