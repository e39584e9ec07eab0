"""Training with Loopholing (residual.source "loopholing", arXiv 2510.19304): a first pass over the same noisy tokens,
without gradient, gives the states of the trained pass.

As in decoding only noisy tokens get a state: what is stored of a finished block had none.

Shapes: B rows, L tokens, M tokens that enter the layers, N masked positions, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rcd_core.families.base import DiffusionModel
from rcd_core.training.objective import LayerTokens, TrainingBatch, layer_tokens


@torch.no_grad()
def first_states(model: DiffusionModel, batch: TrainingBatch, keep: Tensor) -> Tensor:
    """(B, M, D) states; 0 in samples whose keep (N,), equal for all of a sample, is 0."""
    assert model.loophole is not None
    tokens = layer_tokens(model, batch)
    states = model.stream(model.loophole(model.embedding(tokens.ids)), tokens.positions, tokens.layout)
    if model.shifted:  # row i - 1 knows of token i
        states = states.roll(1, 1).masked_fill((tokens.positions == 0)[..., None], 0.0)
    return states * _kept(batch, tokens, keep)[..., None].to(states.dtype)


def _kept(batch: TrainingBatch, tokens: LayerTokens, keep: Tensor) -> Tensor:
    """(B, M) 1 where a token gets its state, else 0."""
    samples = batch.sample_ids + 1  # 0 is padding
    of_sample = torch.ones(len(samples), int(samples.max()) + 1, device=keep.device)
    rows = torch.arange(len(samples), device=keep.device)[:, None].expand_as(samples)
    of_sample[rows[batch.masked], samples[batch.masked]] = keep.to(of_sample)
    kept = of_sample.gather(1, samples)
    if tokens.source is None or tokens.takes is None:
        return kept
    return kept.gather(1, tokens.source) * tokens.takes
