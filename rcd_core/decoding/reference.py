"""The reference's part in decoding: one pass over a block that is still masked, giving signals for its start.

A local model and a remote replica answer the same call, so a target cannot tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from rcd_core.families.base import DiffusionModel
from rcd_core.layouts import block_causal
from rcd_core.signals import DenseSignals, ReferenceSignals, Signals


@dataclass(frozen=True)
class WarmStart:
    """canvas_ids: everything the reference may see, masks in place (SDAR: up to the block's end; LLaDA: the whole
    canvas). positions: the masked positions wanted, absolute and ascending. top_k None: whole distributions, local
    references only."""

    canvas_ids: tuple[int, ...]
    positions: tuple[int, ...]
    block_length: int
    top_k: int | None = None
    alpha_temperature: float = 1.0
    delta_temperature: float = 1.0


class Reference(Protocol):
    """What a Decoder asks of a reference model, wherever it runs."""

    def signals(self, requests: Sequence[WarmStart]) -> list[Signals]: ...


class LocalReference:
    """A reference model in this process. Contexts are computed anew for each block: exact, simple, O(context)."""

    def __init__(self, model: DiffusionModel, max_batch: int = 256) -> None:
        self.model = model
        self.max_batch = max_batch

    @torch.inference_mode()
    def signals(self, requests: Sequence[WarmStart]) -> list[Signals]:
        """One Signals per request, rows in the order of its positions."""
        found: list[Signals] = []
        for start in range(0, len(requests), self.max_batch):
            found += self._batch(requests[start : start + self.max_batch])
        return found

    def _batch(self, requests: Sequence[WarmStart]) -> list[Signals]:
        found: dict[int, Signals] = {}
        # Requests alike in layout and reduction run as one batch.
        kinds = {(r.block_length, r.top_k, r.alpha_temperature, r.delta_temperature) for r in requests}
        for kind in sorted(kinds, key=str):
            rows = [
                i
                for i, r in enumerate(requests)
                if (r.block_length, r.top_k, r.alpha_temperature, r.delta_temperature) == kind
            ]
            counts = [len(requests[i].positions) for i in rows]
            signals = self._reduce(self._hidden([requests[i] for i in rows]), requests[rows[0]])
            ends = np.cumsum(counts)
            for i, end, count in zip(rows, ends, counts, strict=True):
                found[i] = signals[int(end - count) : int(end)]
        return [found[i] for i in range(len(requests))]

    def _hidden(self, requests: Sequence[WarmStart]) -> torch.Tensor:
        """(N, D) hidden states at the wanted positions of all requests, in order."""
        model, device = self.model, self.model.device
        width = max(len(r.canvas_ids) for r in requests)
        ids = np.full((len(requests), width), model.info.pad_token_id, dtype=np.int64)
        wanted = np.zeros(ids.shape, dtype=bool)
        for row, request in enumerate(requests):
            ids[row, : len(request.canvas_ids)] = request.canvas_ids
            wanted[row, list(request.positions)] = True
        lengths = torch.tensor([len(r.canvas_ids) for r in requests], device=device)
        positions = torch.arange(width, device=device).expand(len(requests), -1)
        block = model.attention_block(requests[0].block_length)
        blocks = None if block is None else torch.full_like(lengths, block)
        layout = block_causal(positions, lengths, width, blocks)
        hidden = model.hidden(model.embedding(torch.from_numpy(ids).to(device)), positions, layout)
        return hidden[torch.from_numpy(wanted).to(device)]

    def _reduce(self, hidden: torch.Tensor, request: WarmStart) -> Signals:
        temperatures = {
            "alpha_temperature": request.alpha_temperature,
            "delta_temperature": request.delta_temperature,
        }
        if request.top_k is None:
            return DenseSignals(self.model.head(hidden).float(), **temperatures)
        return ReferenceSignals.from_hidden(hidden, self.model.lm_head_weight, request.top_k, **temperatures)
