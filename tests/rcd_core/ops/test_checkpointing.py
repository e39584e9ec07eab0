"""Selective activation checkpointing: the same gradients, and products and attention are not computed twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rcd_core import load_model
from rcd_core.attention import backends
from tests.rcd_core.training.helpers import GOLDEN


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


def gradients(family: str, mode: Any, length: int) -> tuple[list[torch.Tensor], Counter[str]]:
    model = load_model(GOLDEN / f"{family}_tiny").requires_grad_(True).double()
    model.activation_checkpointing = mode
    ids = torch.randint(0, 400, (2, length), generator=torch.Generator().manual_seed(0))
    with Calls() as calls:
        model.logits(ids, 4).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None], calls.counts


@pytest.mark.parametrize("length", [16, 40])
@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_gradients_are_the_same_and_products_are_kept(
    family: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 40 tokens are attended to in tiles, which have checkpoints of their own."""
    monkeypatch.setattr(backends, "TILE", 20)
    monkeypatch.setattr(backends, "DENSE_PAIRS", 20 * 20)
    plain, expected = gradients(family, False, length)
    whole, twice = gradients(family, True, length)
    some, kept = gradients(family, "selective", length)
    for got in (whole, some):
        assert len(got) == len(plain) and all(map(torch.equal, got, plain))
    assert kept["aten::mm"] == expected["aten::mm"] < twice["aten::mm"]
    assert kept["aten::rsqrt"] == twice["aten::rsqrt"] > expected["aten::rsqrt"]
    if length == 16:
        attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
        assert 0 < kept[attention] == expected[attention] < twice[attention]
