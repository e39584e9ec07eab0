"""Batched passes of a model over pieces of canvases, with the slot cache or without. Target and reference share it.

Shapes: R rows of a pass, Q queries, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.decoding.cache import SlotCache
from rcd_core.families.base import DiffusionModel
from rcd_core.layouts import Layout, block_causal
from rcd_core.residual import inject_residual

_PADDING_SHARE = 0.75  # rows share a pass if the shorter has at least this share of the longer's queries


@dataclass
class Residual:
    """The residual state of a request: (m,) ascending positions, (m,) alpha, (m, D) delta. Never V numbers."""

    positions: NDArray[np.int64]
    alpha: Tensor
    delta: Tensor

    def keep(self, chosen: NDArray[np.bool_]) -> Residual:
        """The state at some of the positions: (m,) True = keep."""
        index = torch.from_numpy(np.flatnonzero(chosen)).to(self.alpha.device)
        return Residual(self.positions[chosen], self.alpha[index], self.delta[index])


@dataclass(frozen=True)
class Work:
    """One row of a pass: ids (q,) at positions [start, start + q), seeing keys [0, num_keys) of its slot. slot None:
    start is 0 and the row sees itself."""

    ids: NDArray[np.int64]
    start: int
    num_keys: int
    block_length: int
    slot: int | None
    residual: Residual | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.ids)


class Forward:
    """Runs rows together. The cache is made when the first row needs it."""

    def __init__(self, model: DiffusionModel, max_batch: int, max_length: int) -> None:
        self.model, self.max_batch, self.max_length = model, max_batch, max_length
        self._cache: SlotCache | None = None

    @property
    def cache(self) -> SlotCache:
        if self._cache is None:
            self._cache = SlotCache(self.model, self.max_batch, self.max_length)
        return self._cache

    def reserve(self, length: int) -> bool:
        """Make room for canvases of this length. True if what the cache held is gone."""
        if length <= self.max_length:
            return False
        self.max_length, self._cache = max(length, 2 * self.max_length), None
        return True

    def hidden(self, works: Sequence[Work]) -> Tensor:
        """(R, Q, D) final hidden states of one batched pass; shorter rows are padded at the end."""
        model, device = self.model, self.model.device
        width, num_keys = max(len(w.ids) for w in works), max(w.num_keys for w in works)
        ids = np.full((len(works), width), model.info.pad_token_id, dtype=np.int64)
        positions = np.zeros_like(ids)
        written = np.full_like(ids, self.max_length)  # where keys and values go; padding into the slot's bin
        residual_at = np.zeros(ids.shape, dtype=bool)
        states: list[Residual] = []
        for row, w in enumerate(works):
            n = len(w.ids)
            ids[row, :n] = w.ids
            positions[row] = np.minimum(np.arange(w.start, w.start + width), w.end - 1)
            written[row, :n] = positions[row, :n]
            if w.residual is not None:
                residual_at[row, w.residual.positions - w.start] = True
                states.append(w.residual)
        embeds = model.embedding(torch.from_numpy(ids).to(device))
        if states:
            alpha, delta = torch.cat([r.alpha for r in states]), torch.cat([r.delta for r in states])
            at = torch.from_numpy(residual_at).to(device)
            embeds = inject_residual(embeds, at, alpha, delta, model.embedding.weight[model.mask_token_id])
        at_positions = torch.from_numpy(positions).to(device)
        view = None
        if works[0].slot is not None:
            slots = torch.tensor([w.slot for w in works], device=device)
            view = self.cache.view(slots, torch.from_numpy(written).to(device), num_keys)
        return model.hidden(embeds, at_positions, self._layout(works, at_positions, num_keys), view)

    def _layout(self, works: Sequence[Work], positions: Tensor, num_keys: int) -> Layout:
        """Who sees whom in this pass; rows may differ in block length."""
        lengths = torch.tensor([w.num_keys for w in works], device=positions.device)
        blocks = [b for w in works if (b := self.model.attention_block(w.block_length))]
        if not blocks:
            return block_causal(positions, lengths, num_keys, None)
        one_block = all(w.start // b == (w.end - 1) // b for w, b in zip(works, blocks, strict=True))
        return block_causal(positions, lengths, num_keys, torch.tensor(blocks, device=positions.device), one_block)


def groups(works: Sequence[Work]) -> list[list[int]]:
    """Indices of rows that go well together: same use of the cache and similar numbers of queries."""
    found: list[list[int]] = []
    for index in sorted(
        range(len(works)), key=lambda i: (works[i].slot is None, len(works[i].ids), works[i].slot or 0)
    ):
        w = works[index]
        if found:
            first = works[found[-1][0]]
            if (first.slot is None) == (w.slot is None) and len(first.ids) >= _PADDING_SHARE * len(w.ids):
                found[-1].append(index)
                continue
        found.append([index])
    return found
