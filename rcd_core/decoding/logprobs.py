"""Log-probabilities of new tokens, for requests that ask for them (Sequence.num_logprobs).

They are the log-softmax of the model's own logits at temperature 1, in the pass that committed the token: before
guidance and every filter. A position that is committed again keeps the last ones.

Shapes: N masked positions that a step predicts, D width.
"""

from __future__ import annotations

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
    rows = np.flatnonzero(commit & (num_top >= 0))
    if not len(rows):
        return
    model, device = masked.blocks[0].sequence.model, hidden.device
    for part in np.array_split(rows, -(-len(rows) // tile_rows(model.vocab_size, device))):
        logprobs = torch.log_softmax(model.head(hidden[torch.from_numpy(part).to(device)]).float(), -1)
        own = logprobs.gather(1, torch.from_numpy(tokens[part])[:, None].to(device)).flatten().tolist()
        top = logprobs.topk(int(num_top[part].max()))
        for row, logprob, ids, values in zip(part, own, top.indices.tolist(), top.values.tolist(), strict=True):
            pairs = list(zip(ids, values, strict=True))[: int(num_top[row])]
            request = masked.blocks[masked.owner[row]].sequence
            request.logprobs[int(masked.positions[row])] = TokenLogprobs(logprob, pairs)


def _num_top(block: LiveBlock) -> int:
    """-1: no logprobs."""
    wanted = block.sequence.num_logprobs
    return -1 if wanted is None or block.is_start_pass else wanted
