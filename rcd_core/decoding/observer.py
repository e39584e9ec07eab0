"""What an engine shows to whoever looks on: the predictions of each step, before anything is committed.

    decoder = Decoder(model, observer=lambda seen: alphas.append(seen.alpha))

An observer changes no token; without one nothing of this is computed.

Shapes: N masked positions that a step predicts, D width, b block length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.decoding.prediction import Reached
from rcd_core.decoding.reference import WarmStart
from rcd_core.decoding.sequence import Sequence


@dataclass(frozen=True)
class Observed:
    """One step. reached: whose masked positions were predicted; their canvases are still as the pass saw them.

    hidden (N, D): final hidden states, of which the model's head makes the logits (before guidance).
    alpha (N,): the weights of the residuals in the pass's input, 0 where there was none. fed (N,): whether the
    request had residuals at all. committed (N,): which predictions become tokens; the others are discarded.
    """

    reached: Reached
    hidden: Tensor
    alpha: NDArray[np.float32]
    fed: NDArray[np.bool_]
    committed: NDArray[np.bool_]

    @property
    def masked_share(self) -> NDArray[np.float64]:
        """(N,) share of the tokens to be denoised that is still masked, where the position's pass sees them together:
        in its block (SDAR), in the whole canvas (LLaDA). 1 - masked_share is the progress of denoising."""
        return self.reached.per_request(masked_share)

    def questions(self, of: NDArray[np.bool_], **wanted: Any) -> list[WarmStart]:
        """What a reference is asked to predict the positions `of` (N,) from the very input that the pass saw, but for
        its residuals; a question per request that has any, in order. wanted: top_k, temperatures."""
        found = []
        for s, start, end in zip(self.reached.sequences, [0, *self.reached.ends[:-1]], self.reached.ends, strict=True):
            positions = self.reached.positions[start:end][of[start:end]]
            if len(positions):
                sees = len(s.canvas) if s.model.blocks_from_prompt_end else s.block[1]
                assert s.settings.block_length is not None
                canvas = tuple(s.canvas[:sees].tolist())
                found.append(WarmStart(canvas, tuple(positions.tolist()), s.settings.block_length, **wanted))
        return found


class Observer(Protocol):
    """Called once a step that predicts anything, in inference mode. Tensors may be overwritten afterwards."""

    def __call__(self, seen: Observed) -> None: ...


def masked_share(s: Sequence) -> float:
    """Of a request, now. See Observed.masked_share; training's masking ratio is its counterpart."""
    start, end = (0, len(s.canvas)) if s.model.blocks_from_prompt_end else s.block
    masked = int((s.canvas[start:end] == s.model.mask_token_id).sum())
    return masked / max(1, int(s.wanted[start:end].sum()))
