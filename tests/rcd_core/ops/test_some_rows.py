"""Final hidden states of some tokens: those of a pass over all, with the same gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rcd_core import load_model
from rcd_core.attention.layouts import block_causal
from rcd_core.decoding.chunk import Chunk
from rcd_core.decoding.engine import Engine
from rcd_core.ops.checkpointing import Mode

GOLDEN = Path(__file__).parents[2] / "golden"
MODELS = (
    *("sdar_tiny", "llada_tiny", "dream/dream_tiny", "fastdllm_v2/fastdllm_v2_tiny", "sdar_moe/sdar_moe_tiny"),
    *("llada2/llada2_tiny", "llada_moe/llada_moe_tiny_options"),
)


@pytest.mark.parametrize("mode", [False, True, "selective"])
@pytest.mark.parametrize("name", MODELS)
def test_some_states_and_their_gradients_are_those_of_all(name: str, mode: Mode) -> None:
    model = load_model(GOLDEN / name).train()
    model.activation_checkpointing = mode
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocab_size - 1, (3, 12), generator=generator)
    positions = torch.arange(12).expand(3, -1)
    layout = block_causal(positions, torch.full((3,), 12), 12, torch.full((3,), 4))
    masked = torch.randperm(36, generator=generator)[:14].sort().values
    masked = torch.cat([torch.tensor([0, 1]), masked[masked > 1]])  # both are predicted by row 0 of a shifted model
    at = model.predictors(masked, masked % 12 == 0)
    upstream = torch.randn(len(at), model.config.hidden_size, generator=generator)
    found = []
    for some in (None, at):
        model.zero_grad()
        hidden = model.hidden(model.embedding(ids), positions, layout, at=some)
        hidden = hidden if some is not None else hidden.flatten(0, 1)[at]
        hidden.backward(upstream)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((hidden.detach(), grads))
    (whole, every), (states, grads) = found
    torch.testing.assert_close(states, whole, rtol=1e-5, atol=1e-5)
    assert grads.keys() == every.keys() and len(grads) > 8
    for parameter, grad in grads.items():
        torch.testing.assert_close(grad, every[parameter], rtol=1e-4, atol=1e-5, msg=parameter)
    assert "forward" not in vars(model.backbone.model.layers[-1].mlp)


@pytest.mark.parametrize("name", MODELS)
def test_decoding_computes_the_same_states(name: str) -> None:
    """Each time over an empty cache, whose keys and values of all tokens the second pass reads."""
    model, ids = load_model(GOLDEN / name), np.arange(5, 17)
    at = np.array([3, 7, 7, 11, 0])
    found = []
    for some in (None, at):
        forward = Engine(model, None, max_batch=1, max_length=32)._runner.forward
        forward.tables.array[0] = 1 + np.arange(forward.tables.array.shape[1])
        with torch.inference_mode():
            first = forward.hidden(forward.pack([(0, [Chunk(ids, 0, 12, 4)])]), some)
            second = forward.hidden(forward.pack([(0, [Chunk(ids, 12, 24, 4)])]))
        found.append((first if some is not None else first[torch.from_numpy(at)], second))
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)
