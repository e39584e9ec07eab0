"""Observers of decoding: they see the predictions of every denoising step before anything is committed.

    decoder = Decoder(model, observer=lambda step: alphas.append(step.alpha))

An observer changes no token. Without one, nothing extra is computed.

Shapes: N masked positions that a step predicts, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.decoding.masked_positions import MaskedPositions
from rcd_core.decoding.reference import WarmStart
from rcd_core.decoding.sequence import LiveBlock


@dataclass(frozen=True)
class Observed:
    """One step. masked: the predicted positions; the canvases of their requests are still as the pass saw them.

    hidden (N, D): final hidden states, before guidance; the model's head makes the logits of them.
    alpha (N,): weights of the residuals in the pass's input, 0 where there was none. has_residual (N,): whether the
    request had residuals at all. committed (N,): predictions that become tokens. discarded (N,): predictions of masked
    positions that do not; with `editing_threshold`, `masked` also has positions that hold a token.
    """

    masked: MaskedPositions
    hidden: Tensor
    alpha: NDArray[np.float32]
    has_residual: NDArray[np.bool_]
    committed: NDArray[np.bool_]

    @property
    def discarded(self) -> NDArray[np.bool_]:
        return ~self.committed if self.masked.filled is None else ~(self.committed | self.masked.filled)

    @property
    def masked_share(self) -> NDArray[np.float64]:
        """(N,) masking ratio around each position: of its block (SDAR) or of the whole canvas (LLaDA), relative to the
        tokens to be denoised. 1 - masked_share is the progress of denoising; in training it is the masking ratio."""
        return self.masked.per_block(_masked_share)

    def reference_requests(self, where: NDArray[np.bool_], **options: Any) -> list[WarmStart]:
        """Requests to a reference to predict the positions `where` (N,) from the pass's input without its residuals:
        one for each block that has such positions, in order. options: top_k and temperatures of WarmStart."""
        parts = zip(self.masked.blocks, self.masked.slices(), strict=True)
        pairs = [(block, self.masked.positions[part][where[part]]) for block, part in parts]
        return [WarmStart.of(block, positions, **options) for block, positions in pairs if len(positions)]


class Observer(Protocol):
    """Called after every denoising step, in inference mode. Later steps may overwrite the tensors."""

    def __call__(self, step: Observed, /) -> None: ...


def _masked_share(b: LiveBlock) -> float:
    s = b.sequence
    start, end = (b.start, b.end) if s.block_causal else (0, len(s.canvas))
    masked = int((s.canvas[start:end] == s.model.mask_token_id).sum())
    return masked / max(1, int(s.initially_masked[start:end].sum()))
