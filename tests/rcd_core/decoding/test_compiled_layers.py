"""What GPUs run compiled, compiled for the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rcd_core.decoding.chunk import Chunk
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.layers import Layers
from tests.rcd_core.decoding.test_decoding import FAMILIES, model


@pytest.mark.drill
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_equal_the_others(family: str) -> None:
    """Passes of several lengths, one of a single token, with few compilations."""
    m, hidden = model(family), []
    torch._dynamo.reset()  # what another family compiled may serve this one, too
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        forward = Engine(m, None, max_batch=2, max_length=64)._runner.forward
        forward.layers = Layers(m.backbone.model, m.config, compiled)
        for start, length in ((0, 20), (20, 8), (28, 12), (40, 1)):
            chunk = Chunk(np.arange(5, 5 + length), start, start + length, 4)
            with torch.inference_mode():
                hidden.append(forward.hidden(forward.pack([(0, [chunk]), (1, [chunk])])))
    for plain, found in zip(hidden[:4], hidden[4:], strict=True):
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
