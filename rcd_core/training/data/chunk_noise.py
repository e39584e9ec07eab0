"""The masks of many examples in one draw at once: noise.mask_example, over a chunk's tokens laid end to end.

Row by row, small arrays cost more than the reference's pass over a small row; the numbers are the same to the bit.

Shapes: R examples, T tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rcd_core.noise import NoiseSettings, hash_key, mask_example, splitmix64


def mask_examples(
    maskable: NDArray[np.bool_],
    offsets: NDArray[np.int64],
    example_ids: Sequence[str],
    draw: int,
    settings: NoiseSettings,
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """maskable (T,), offsets (R + 1,) where examples begin -> (masked (T,), p (T,)).

    An example without a maskable token gets an empty mask, where mask_example raises.
    """
    possible = _counts(maskable, offsets)
    if settings.block_length is None:
        keys = np.array([hash_key(settings.seed, draw, name, 0) for name in example_ids], dtype=np.uint64)
        lengths = np.diff(offsets)
        streams = splitmix64(keys)
        levels = (1.0 - settings.eps) * _uniform(streams) + settings.eps  # counter 0; the tokens' counters begin at 1
        counters = np.arange(1, len(maskable) + 1, dtype=np.int64) - np.repeat(offsets[:-1], lengths)
        p = np.repeat(levels, lengths)
        masked = (_uniform(counters.astype(np.uint64) ^ np.repeat(streams, lengths)) < p) & maskable
    else:  # a noise level per block is drawn example by example
        masked, p = np.zeros_like(maskable), np.ones(len(maskable))
    # So is an empty mask, which is drawn again.
    for row in np.flatnonzero((_counts(masked, offsets) == 0) & (possible > 0)).tolist():
        part = slice(offsets[row], offsets[row + 1])
        masked[part], p[part] = mask_example(maskable[part], example_ids[row], draw, settings)
    return masked, p


def _uniform(state: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (splitmix64(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _counts(flags: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """(R,) true ones of each example."""
    upto = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
    return np.asarray(upto[offsets[1:]] - upto[offsets[:-1]])
