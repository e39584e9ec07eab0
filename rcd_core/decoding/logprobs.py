"""Log-probabilities of new tokens, for requests that ask for them (Sequence.num_logprobs), and the candidates of every
predicted position for the trace (Sequence.num_candidates).

They are of the model's own softmax at temperature 1: before guidance and every filter. Log-probabilities are those of
the pass that committed the token. A position that is committed again keeps the last ones.

Shapes: N masked positions that a step predicts, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.decoding.chunk import Positions
from rcd_core.decoding.generation import TokenLogprobs
from rcd_core.decoding.masked_positions import MaskedPositions
from rcd_core.decoding.sequence import LiveBlock
from rcd_core.ops.tiles import tile_rows


def keep_logprobs(masked: MaskedPositions, commit: NDArray[np.bool_], tokens: Positions, hidden: Tensor) -> None:
    """Store the logprobs of the predictions that are committed. commit, tokens: (N,); hidden: (N, D). Computes nothing
    for requests that do not ask."""
    num_top = masked.per_block(_num_top)
    for part, logprobs in _logprobs(masked, np.flatnonzero(commit & (num_top >= 0)), hidden):
        own = logprobs.gather(1, torch.from_numpy(tokens[part])[:, None].to(hidden.device)).flatten().tolist()
        top = logprobs.topk(int(num_top[part].max()))
        for row, logprob, ids, values in zip(part, own, top.indices.tolist(), top.values.tolist(), strict=True):
            pairs = list(zip(ids, values, strict=True))[: int(num_top[row])]
            request = masked.blocks[masked.owner[row]].sequence
            request.logprobs[int(masked.positions[row])] = TokenLogprobs(logprob, pairs)


def candidates_of(masked: MaskedPositions, hidden: Tensor) -> list[list[tuple[int, float]]]:
    """(N,) the most probable (token id, probability) of each prediction, as many as its request asks for. hidden:
    (N, D). Computes nothing for the others."""
    num_top = masked.per_block(_num_candidates)
    found: list[list[tuple[int, float]]] = [[] for _ in masked.positions]
    for part, logprobs in _logprobs(masked, np.flatnonzero(num_top), hidden):
        top = logprobs.topk(min(int(num_top[part].max()), logprobs.shape[1]))
        for row, ids, values in zip(part, top.indices.tolist(), top.values.exp().tolist(), strict=True):
            found[row] = list(zip(ids, values, strict=True))[: int(num_top[row])]
    return found


def _logprobs(
    masked: MaskedPositions, rows: NDArray[np.int64], hidden: Tensor
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Tiles of `rows` (n,) of hidden, each with its log-probabilities (n, V)."""
    if not len(rows):
        return
    model, device = masked.blocks[0].sequence.model, hidden.device
    for part in np.array_split(rows, -(-len(rows) // tile_rows(model.vocab_size, device))):
        yield part, torch.log_softmax(model.head(hidden[torch.from_numpy(part).to(device)]).float(), -1)


def _num_candidates(block: LiveBlock) -> int:
    return 0 if block.is_start_pass else block.sequence.num_candidates


def _num_top(block: LiveBlock) -> int:
    """-1: no logprobs."""
    wanted = block.sequence.num_logprobs
    return -1 if wanted is None or block.is_start_pass else wanted
