"""Key/value cache in pages. A request has a table of pages; its position p lies in page table[p // page_size].

Every pass writes keys and values at their tokens' positions, over those of the pass before, so nothing is ever cropped.
A page whose positions are all final tokens of whole blocks is registered under a hash of these tokens and all before
them. A later request with the same beginning takes the page instead of computing it. Freed pages keep their content
until they are needed, least recently used first.

Shapes: P pages, p positions of a page, G key/value heads, d head width.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from rcd_core.families.base import DiffusionModel

Ids = NDArray[np.int64]
PAGE_SIZE = {"cuda": 256, "cpu": 16}  # flash-attn 2 reads only pages of a multiple of 256 positions


def page_size_of(device: torch.device) -> int:
    return PAGE_SIZE.get(device.type, 16)


def bytes_per_position(model: DiffusionModel) -> int:
    """Bytes of keys and values of one position in all layers."""
    c = model.config
    return 2 * int(c.num_hidden_layers * c.num_key_value_heads * c.head_dim) * model.dtype.itemsize


class PagedCache:
    """Keys and values of all pages, (P p, G, d) a layer. Page 0 belongs to nobody: padding of fixed shapes uses it."""

    def __init__(self, model: DiffusionModel, num_pages: int, page_size: int) -> None:
        c = model.config
        shape = ((num_pages + 1) * page_size, c.num_key_value_heads, c.head_dim)
        self.page_size = page_size
        self.keys = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(c.num_hidden_layers)]
        self.values = [torch.zeros_like(k) for k in self.keys]

    def copy(self, sources: list[int], destinations: list[int]) -> None:
        """Copy whole pages."""
        to, of = (torch.tensor(pages, device=self.keys[0].device) for pages in (destinations, sources))
        for tensor in (*self.keys, *self.values):
            pages = tensor.view(-1, self.page_size, *tensor.shape[1:])
            pages[to] = pages[of]

    def clear(self, pages: Iterable[int]) -> None:
        """Forget keys and values that are not finite: a masked one still has weight 0, and 0 * NaN is NaN."""
        for page in pages:
            part = slice(page * self.page_size, (page + 1) * self.page_size)
            for tensor in (*self.keys, *self.values):
                tensor[part].zero_()


class Pages:
    """Allocation of pages 1 to num_pages. Free pages are taken in the order of their release."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_pages + 1))
        self._users: dict[int, int] = {}  # page -> tables that hold it
        self._shared: dict[bytes, tuple[int, ...]] = {}  # hash -> pages of one unit
        self._hashes: dict[int, bytes] = {}  # the reverse

    @property
    def num_free(self) -> int:
        return len(self._free)

    def count(self, length: int) -> int:
        """Pages of so many positions."""
        return -(-length // self.page_size)

    def take(self, count: int, preferred: int = 0) -> list[int] | None:
        """`count` pages, or None if so many are not free. preferred: the first of a run of pages to take if they are
        free, because attention on a CPU reads neighbouring pages without a copy."""
        if count > len(self._free):
            return None
        pages = []
        for i in range(count):
            page = preferred + i
            if preferred == 0 or page not in self._free:
                page = next(iter(self._free))
            del self._free[page]
            self._forget(page)
            self._users[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: list[int]) -> None:
        """Give pages back. A later page of a prefix is worth less than an earlier one, so it is taken first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                self._free[page] = None

    def forget(self, pages: list[int]) -> list[int]:
        """The pages that only one table holds; their hashes are dropped."""
        alone = [page for page in pages if self._users[page] == 1]
        for page in alone:
            self._forget(page)
        return alone

    def _forget(self, page: int) -> None:
        for other in self._shared.pop(self._hashes.get(page, b""), ()):
            del self._hashes[other]

    # -- shared prefixes. A unit is the smallest number of whole pages that is a number of whole blocks.
    def find(self, ids: Ids, block_length: int, limit: int) -> list[int]:
        """Take the pages that already hold the first tokens of ids (T,), whole units of ids[:limit]."""
        found: list[int] = []
        for key, _ in self._units(ids, block_length, limit):
            if key not in self._shared:
                break
            found += self._shared[key]
        for page in found:
            self._free.pop(page, None)
            self._users[page] = self._users.get(page, 0) + 1
        return found

    def register(self, table: list[int], ids: Ids, block_length: int, start: int, end: int) -> None:
        """ids[:end] are final and stored in the pages of `table`; those of ids[:start] were registered before."""
        unit = math.lcm(self.page_size, block_length)
        if end // unit <= start // unit:
            return
        for key, part in self._units(ids, block_length, end):
            pages = tuple(table[part])
            if key not in self._shared and not any(page in self._hashes for page in pages):
                self._shared[key] = pages
                self._hashes.update(dict.fromkeys(pages, key))

    def _units(self, ids: Ids, block_length: int, limit: int) -> Iterable[tuple[bytes, slice]]:
        """(hash of the tokens up to the unit's end, its place in a table). The block length is hashed too, because
        another one is another attention."""
        unit, key = math.lcm(self.page_size, block_length), b"%d" % block_length
        for end in range(unit, limit + 1, unit):
            key = hashlib.blake2b(key + ids[end - unit : end].tobytes(), digest_size=16).digest()
            yield key, slice((end - unit) // self.page_size, end // self.page_size)
