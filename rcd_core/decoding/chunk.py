"""Neighbouring tokens of a request in a pass.

Shapes: q tokens of a chunk.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

PassKind = Literal["prefill", "denoise", "store"]
Positions = NDArray[np.int64]


class Chunk(NamedTuple):
    """A request's neighbouring tokens in a pass: token_ids (q,) at positions [start, start + q).

    block_length: each block, counted from position `grid`, is a row of the pass that sees the keys up to its end.
    None: the chunk is one row that sees the keys [0, num_keys). residual: (start, end): masked tokens at these
    positions take in the residual state; with Loopholing all tokens, and the pass leaves its own states at the
    positions `keeps`.
    """

    token_ids: Positions
    start: int
    num_keys: int
    block_length: int | None
    residual: tuple[int, int] | None = None
    grid: int = 0
    keeps: tuple[int, int] | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)
