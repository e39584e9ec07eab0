"""Deterministic mode on a fake GPU: which operations reach it, as PyTorch's kernels themselves cannot run here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from rcd_core import LocalReference
from rcd_core.attention import paged
from rcd_core.decoding.engine import Engine
from tests.rcd_core.fake_gpu.device import FakeGpu
from tests.rcd_core.fake_gpu.models import fake_model
from tests.rcd_core.fake_gpu.test_engine import LLADA, SDAR, requests, run
from tests.rcd_core.fake_gpu.test_training import train_on

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")
# For which torch.use_deterministic_algorithms raises on CUDA, by its documentation. `cumsum` only of floats, which the
# modes below watch separately; `index_put_` only without `accumulate`, where an index comes twice: ours are distinct.
RAISES = {
    *("bincount", "histc", "kthvalue", "median", "put_", "put", "scatter_reduce", "resize_", "mode"),
    *("adaptive_avg_pool2d_backward", "ctc_loss", "grid_sampler_2d_backward", "multilabel_margin_loss"),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False, raising=False)
    with FakeGpu() as entered:
        yield entered
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def float_sums(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """dtypes of CUDA tensors whose running sum was taken by cumsum."""
    found: list[torch.dtype] = []
    inner = torch.Tensor.cumsum

    def cumsum(self: torch.Tensor, *dims: Any, **options: Any) -> torch.Tensor:
        if self.is_cuda and self.is_floating_point():
            found.append(self.dtype)
        return inner(self, *dims, **options)

    monkeypatch.setattr(torch.Tensor, "cumsum", cumsum)
    return found


@pytest.mark.parametrize("name", ["filtered confidence", "drawn", "sparse and drawn", "uniform", "sparse reference"])
def test_decoding(name: str, gpu: FakeGpu, float_sums: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not captured, not compiled, one split of the keys, and no operation that raises."""
    splits = []
    inner = paged.VarlenAttention.__call__

    def watched(self: Any, *inputs: Any) -> Any:
        splits.append(self.num_splits)
        return inner(self, *inputs)

    monkeypatch.setattr(paged.VarlenAttention, "__call__", watched)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    settings = SDAR[name]
    reference = LocalReference(fake_model(gpu, layers=1)) if settings.start == "reference" else None
    engine = Engine(fake_model(gpu, layers=1), reference, max_batch=4, max_length=64, attention="varlen")
    run(gpu, engine, requests(engine.model, settings))
    assert not gpu.captures and set(splits) == {1} and not float_sums
    assert not RAISES & set(gpu.calls)


def test_llada(gpu: FakeGpu, float_sums: list[Any]) -> None:
    settings = replace(LLADA["guided and drawn"], top_k=50, top_p=0.9)
    engine = Engine(fake_model(gpu, "llada", layers=1), None, max_batch=4, max_length=64, attention="varlen")
    run(gpu, engine, requests(engine.model, settings))
    assert not float_sums and not RAISES & set(gpu.calls)


@pytest.mark.parametrize("source", ["none", "signals", "online", "self", "loopholing"])
def test_a_training_step(source: str, gpu: FakeGpu, float_sums: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    [line] = train_on(gpu, monkeypatch, "sdar", source)
    assert line["step"] == 1 and not float_sums and not RAISES & set(gpu.calls)
