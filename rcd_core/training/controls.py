"""Controls of the experiments, not part of the method: residual.source "self_same" and "on_policy".

self_same   self-residual from a pass over the SAME input: does a noisier earlier pass matter?
on_policy   no residual, but masks as the model's own decoding would leave them: do the masks alone explain the gain?

Shapes: B rows, L tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rcd_core.families.base import DiffusionModel
from rcd_core.ops.tiles import tile_rows
from rcd_core.training.objective import TrainingBatch, least_confident, masked_hidden


def same_masks(masked: NDArray[np.bool_], num_passes: int) -> list[NDArray[np.bool_]]:
    """self_same: every earlier pass sees the row's own mask (L,)."""
    return [masked] * num_passes


@torch.no_grad()
def on_policy_batch(model: DiffusionModel, batch: TrainingBatch, noisier: Tensor) -> TrainingBatch:
    """on_policy: each block keeps its number of masks, on the tokens the model is least confident of after one pass
    over the noisier mask (B, L)."""
    hidden = masked_hidden(model, batch.remasked(noisier, model.mask_token_id), None)
    tile = tile_rows(model.vocab_size, hidden.device)

    def top(head: Tensor, rows: Tensor) -> Tensor:  # (N',) largest log-probabilities
        return torch.cat([torch.log_softmax(F.linear(h, head).float(), -1).amax(-1) for h in torch.split(rows, tile)])

    masked = torch.zeros_like(noisier)
    masked[noisier] = least_confident(model, batch, noisier, model.lm_head(hidden, top))
    return batch.remasked(masked, model.mask_token_id)
