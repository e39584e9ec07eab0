"""The k largest entries of every row, by the method that is fastest for the size of the vocabulary.

Shapes: N rows, V vocabulary, K kept entries.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BLOCK = 64  # ids per block that is represented by its largest logit
_SORTED_VOCAB = 1024  # up to here sorting whole rows with numpy's vector sort beats torch.topk on a CPU


def top_k(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk(z, k) of (N, V) floats, k <= V: values and int64 ids (N, K), in descending order, NaN first. As there,
    it is not specified which of equal entries are taken."""
    if z.device.type == "cpu" and z.dtype == torch.float32 and z.shape[1] <= _SORTED_VOCAB:
        return _by_sorting(z, k)
    if z.shape[1] >= 8 * k * _BLOCK:
        return _by_blocks(z, k)
    return torch.topk(z, k)


def largest(z: Tensor) -> tuple[Tensor, Tensor]:
    """z.max(-1) of (N, V) floats: values and int64 ids (N,), the first of equals, NaN before all. On a CPU torch looks
    at one entry after the other there, which takes 6 to 13 times as long as numpy's search (V = 320 to 151,936)."""
    if type(z) is Tensor and z.device.type == "cpu" and z.dtype in (torch.float32, torch.float64):
        ids = torch.from_numpy(z.detach().numpy().argmax(-1))
        return z.gather(-1, ids[:, None])[:, 0], ids
    values, ids = z.max(-1)
    return values, ids


def _by_sorting(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k-th largest value of each row, then take the entries that are at least as large. Rows with NaN or with
    equals of the k-th value use torch.topk instead, alone, so that a row's result does not depend on other rows."""
    num_rows, vocab_size = z.shape
    values = z.numpy()
    taken = values >= np.sort(values, axis=1)[:, vocab_size - k, None]
    unambiguous = torch.from_numpy(np.count_nonzero(taken, axis=1) == k)
    if not unambiguous.all():
        top, ids = torch.topk(z, k)
        if unambiguous.any():
            top[unambiguous], ids[unambiguous] = _by_sorting(z[unambiguous], k)
        return top, ids
    flat = np.flatnonzero(taken)
    kept = np.ascontiguousarray(values.ravel()[flat]).view(np.int32)
    # One integer key that sorts by descending value, then by id. The bits of a float sort like the float once those of
    # negative numbers are flipped.
    descending = ~(kept ^ ((kept >> 31) & 0x7FFFFFFF))
    keys = (descending.astype(np.int64) << 32 | flat).reshape(num_rows, k)
    keys.sort(axis=1)
    places = keys & 0xFFFFFFFF
    return torch.from_numpy(values.ravel()[places]), torch.from_numpy(
        places - np.arange(num_rows)[:, None] * vocab_size
    )


def _by_blocks(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k blocks with the largest maxima hold the k largest entries, so only they are searched."""
    num_rows, vocab_size = z.shape
    num_blocks = vocab_size // _BLOCK
    whole = num_blocks * _BLOCK
    blocks = z[:, :whole].view(num_rows, num_blocks, _BLOCK)
    best = blocks.amax(-1).topk(k, sorted=False).indices
    values = blocks.gather(1, best[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    ids = (best[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=z.device)).flatten(1)
    if whole < vocab_size:  # the last, shorter block is always searched
        rest = torch.arange(whole, vocab_size, device=z.device).expand(num_rows, -1)
        values, ids = torch.cat([values, z[:, whole:]], 1), torch.cat([ids, rest], 1)
    top, places = values.topk(k)
    return top, ids.gather(1, places)
