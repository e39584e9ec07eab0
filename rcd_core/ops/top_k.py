"""The k largest entries of every row, by the way that is fastest for the size of the vocabulary.

Shapes: N rows, V vocabulary, K kept entries.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BLOCK = 64  # ids whose largest logit stands for all of them
_SORTED_VOCAB = 1024  # up to here sorting whole rows with numpy's vector sort beats torch.topk on a CPU


def top_k(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk(z, k) of (N, V) floats, k <= V: values and int64 ids (N, K), in descending order, NaN first. Which
    of equal entries are taken is left open, as it is there."""
    if z.device.type == "cpu" and z.dtype == torch.float32 and z.shape[1] <= _SORTED_VOCAB:
        return _by_sorting(z, k)
    if z.shape[1] >= 8 * k * _BLOCK:
        return _by_blocks(z, k)
    return torch.topk(z, k)


def _by_sorting(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest value of each row, then the entries that reach it. Where these are not k (NaN, or equals of the
    k-th value): torch.topk, for those rows only, so that a row's answer does not depend on its neighbours."""
    num_rows, vocab_size = z.shape
    values = z.numpy()
    reach = values >= np.sort(values, axis=1)[:, vocab_size - k, None]
    clear = torch.from_numpy(np.count_nonzero(reach, axis=1) == k)
    if not clear.all():
        top, ids = torch.topk(z, k)
        if clear.any():
            top[clear], ids[clear] = _by_sorting(z[clear], k)
        return top, ids
    flat = np.flatnonzero(reach)
    kept = np.ascontiguousarray(values.ravel()[flat]).view(np.int32)
    # One integer that sorts by descending value, then by id: the bits of a float sort like it once the magnitude of
    # the negative ones is turned round.
    descending = ~(kept ^ ((kept >> 31) & 0x7FFFFFFF))
    keys = (descending.astype(np.int64) << 32 | flat).reshape(num_rows, k)
    keys.sort(axis=1)
    places = keys & 0xFFFFFFFF
    return torch.from_numpy(values.ravel()[places]), torch.from_numpy(
        places - np.arange(num_rows)[:, None] * vocab_size
    )


def _by_blocks(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k blocks with the largest maxima hold the k largest entries: one cheap pass, then a search in a few."""
    num_rows, vocab_size = z.shape
    num_blocks = vocab_size // _BLOCK
    whole = num_blocks * _BLOCK
    blocks = z[:, :whole].view(num_rows, num_blocks, _BLOCK)
    best = blocks.amax(-1).topk(k, sorted=False).indices
    values = blocks.gather(1, best[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)
    ids = (best[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=z.device)).flatten(1)
    if whole < vocab_size:  # the last, shorter block is always looked at
        rest = torch.arange(whole, vocab_size, device=z.device).expand(num_rows, -1)
        values, ids = torch.cat([values, z[:, whole:]], 1), torch.cat([ids, rest], 1)
    top, places = values.topk(k)
    return top, ids.gather(1, places)
