"""Key/value cache in slots, one per running request, written in place; and what old slots still hold for new prompts.

A block's keys and values are written at their own positions in every pass and overwritten by the next, so there is
nothing to crop. Slots rather than pages: the rows of a pass are then one view of the cache with static shapes, which
attention reads without a gather; pages save memory only where lengths differ widely, and need kernels of their own.
Positions come before heads, as flash-attn's cache kernel wants them, and as one pass's tokens are written in one copy.

Shapes: S slots, T positions (one more is the bin for padding), R rows of a pass, Q queries, K keys, G key/value heads,
d head width.
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
    """Bytes of keys and values of one position in all layers: what `max_batch` x `max_length` of an engine costs."""
    c = model.config
    return 2 * int(c.num_hidden_layers * c.num_key_value_heads * c.head_dim) * model.dtype.itemsize


class SlotCache:
    def __init__(self, model: DiffusionModel, num_slots: int, num_positions: int) -> None:
        c = model.config
        shape = (num_slots, num_positions + 1, c.num_key_value_heads, c.head_dim)
        self.keys = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(c.num_hidden_layers)]
        self.values = [torch.zeros_like(k) for k in self.keys]

    def copy(self, source: int, destination: int, length: int) -> None:
        """Positions [0, length) of one slot into another."""
        for tensor in (*self.keys, *self.values):
            tensor[destination, :length] = tensor[source, :length]


class CacheView:
    """What transformer layers see as `past_key_values` during one pass.

    written (R Q,): where the tokens' keys and values go, slot x (T + 1) + position. slots: those of the rows, a slice
    of neighbours (read as a view), (R,) numbers (copied together), or None where attention finds its slots in the whole
    pool itself. num_keys: positions read of each.
    """

    def __init__(self, cache: SlotCache, written: Tensor, slots: slice | Tensor | None, num_keys: int) -> None:
        self.cache, self.written, self.slots, self.num_keys = cache, written, slots, num_keys

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """(R, G, Q, d) each -> all keys and values that the rows may see, (R, G, K, d); or the pools, (S, G, T + 1,
        d)."""
        found = []
        for new, pool in ((key, self.cache.keys[layer_idx]), (value, self.cache.values[layer_idx])):
            tokens = new.transpose(1, 2).reshape(len(self.written), -1)
            pool.view(-1, tokens.shape[1]).index_copy_(0, self.written, tokens)
            read = pool if self.slots is None else pool[self.slots][:, : self.num_keys]
            found.append(read.transpose(1, 2))
        return found[0], found[1]


@dataclass
class Held:
    """A slot has the exact keys and values of ids[0:stored], computed in blocks of block_length (part of the key:
    another block length is another attention layout)."""

    block_length: int
    ids: Ids
    stored: int = 0


class Slots:
    """Who has which slot. A released slot keeps what it holds until it is needed; the longest unused goes first."""

    def __init__(self, num_slots: int) -> None:
        self.free = list(range(num_slots))  # in order of release
        self.held: dict[int, Held] = {}

    def take(self, ids: Ids, block_length: int, num_wanted: int) -> tuple[int, int, int]:
        """A slot for a request with these ids -> (slot, source, reused): [0, reused) of slot `source` are already those
        of ids[0:num_wanted], whole blocks only; source may be the slot itself. reused 0: nothing to copy."""
        source, reused = -1, 0
        for slot, held in self.held.items() if num_wanted else ():
            if held.block_length == block_length:
                length = min(held.stored, num_wanted)
                other = np.flatnonzero(held.ids[:length] != ids[:length])
                length = int(other[0]) if len(other) else length
                length -= length % block_length
                # Where two hold as much, the free one: it needs no copy.
                if length > reused or (length == reused > 0 and slot in self.free):
                    source, reused = slot, length
        slot = source if source in self.free else self.free[0]
        self.free.remove(slot)
        self.held[slot] = Held(block_length, ids, reused)
        return slot, source, reused

    def release(self, slot: int) -> None:
        self.free.append(slot)
