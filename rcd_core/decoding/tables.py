"""Slots and page tables of the running requests: who holds which pages, and whose prefix others may use.

With lanes, the pages of slot s are always the same neighbouring ones, which attention on a CPU, and a kernel that
follows no table, reads in place. A shared prefix is copied into them. Without lanes, pages are taken one by one as a
request grows, and shared pages are held by several requests at once.

Shapes: S slots, C pages of a table.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rcd_core.decoding.pages import Ids, PagedCache, Pages
from rcd_core.decoding.sequence import Sequence


class Tables:
    """num_pages None: lanes for num_slots requests of max_length positions. array (S + 1, C): pages by slot, 0 where
    there is none; the last row stays empty."""

    def __init__(self, num_slots: int, max_length: int, page_size: int, num_pages: int | None = None) -> None:
        columns = -(-max_length // page_size)
        self.page_size = page_size
        self.lane_pages = columns if num_pages is None else None
        self.num_pages = num_slots * columns if num_pages is None else num_pages
        self.array: NDArray[np.int64] = np.zeros((num_slots + 1, columns), dtype=np.int64)
        self._pages = Pages(self.num_pages, page_size)
        self._slots = list(range(num_slots))  # free ones, in order of release
        self._registered: dict[Sequence, int] = {}  # positions whose pages are registered

    @property
    def num_free_slots(self) -> int:
        return len(self._slots)

    @property
    def num_free_pages(self) -> int:
        return self._pages.num_free

    def open(self, s: Sequence, limit: int, cache: PagedCache) -> int | None:
        """Give a request a slot, and pages that hold its first tokens, whole units of canvas[:limit]. Returns how many
        of them, or None if there are no pages for it yet."""
        found = self.find(s.canvas, s.settings.block_length, limit) if limit else []
        reused = len(found) * self.page_size
        if self.lane_pages is None:
            # Room for the tokens of its next pass, so that it is not admitted only to be preempted.
            if self._pages.num_free < self._pages.count(s.live[-1].visible_end) - len(found):
                self._pages.release(found)
                return None
            s.slot, s.pages = self._slots.pop(0), found
        else:
            s.slot = self._free_lane(found)
            self._slots.remove(s.slot)
            first = 1 + s.slot * self.lane_pages
            own = list(range(first, first + len(found)))
            count = self._pages.count(len(s.canvas))
            if found != own:
                sources, found = found, []
                s.pages = self._pages.take(count, first) or []
                cache.copy(sources, own)
                self._pages.release(sources)
            else:
                s.pages = found + (self._pages.take(count - len(found), first + len(found)) or [])
        self.array[s.slot, : len(s.pages)] = s.pages
        self._registered[s] = reused
        return reused

    def _free_lane(self, found: list[int]) -> int:
        """The slot whose lane begins with the found pages, if it is free; else the one released first."""
        assert self.lane_pages is not None
        slot = (found[0] - 1) // self.lane_pages if found else -1
        return slot if slot in self._slots else self._slots[0]

    def fill(self) -> None:
        """Give every slot its whole lane."""
        for slot in range(len(self._slots)):
            self.array[slot] = 1 + slot * self.array.shape[1] + np.arange(self.array.shape[1])

    def find(self, ids: Ids, block_length: int, limit: int) -> list[int]:
        return self._pages.find(ids, block_length, limit)

    def grow(self, s: Sequence, length: int) -> bool:
        """Pages for positions [0, length). False if none are left."""
        missing = self._pages.count(length) - len(s.pages)
        if missing <= 0:
            return True
        pages = self._pages.take(missing)
        if pages is None:
            return False
        self.array[s.slot, len(s.pages) : len(s.pages) + missing] = pages
        s.pages += pages
        return True

    def register(self, s: Sequence) -> None:
        """Others may use the pages of the positions that the request has stored."""
        before = self._registered[s]
        if s.stored > before:
            self._pages.register(s.pages, s.canvas, s.settings.block_length, before, s.stored)
            self._registered[s] = s.stored

    def forget(self, s: Sequence) -> list[int]:
        """The pages that only this request holds; nobody will find them by their tokens."""
        return self._pages.forget(s.pages)

    def close(self, s: Sequence) -> None:
        self._pages.release(s.pages)
        self.array[s.slot] = 0
        self._slots.append(s.slot)
        s.pages, s.slot = [], -1
        del self._registered[s]
