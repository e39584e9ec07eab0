"""The remote reference as the engine sees it: one call per batch, tried twice, no calls while no replica answers."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError

from pipelines.serving.reference import RemoteReference
from rcd_core import Decoder, DecodeSettings, LocalReference, WarmStart, load_model
from rcd_core.evaluation.flops import shape_of
from tests.pipelines.serving.serve_run import until

GOLDEN = Path(__file__).parents[2] / "golden"
REQUEST = WarmStart(canvas_ids=(5, 6, 511, 511), positions=(2, 3), block_length=4, top_k=16)


@cache
def model(name: str) -> Any:
    torch.set_num_threads(1)
    return load_model(GOLDEN / name)


class Handle:
    """A deployment of one reference. It dies `deaths` times, and is ready once `back` is set."""

    def __init__(self, name: str = "rcd/sdar_ref_tiny", deaths: int = 0) -> None:
        self.local, self.deaths = LocalReference(model(name)), deaths
        self.back = threading.Event()
        self.calls: list[list[WarmStart]] = []
        self.sessions: list[str] = []
        self.signals, self.ready = Method(self._signals), Method(self._ready)
        self.shape = Method(lambda: shape_of(self.local.model))

    def options(self, session_id: str) -> Handle:
        self.sessions.append(session_id)
        return self

    def _signals(self, requests: list[WarmStart]) -> list[bytes]:
        self.calls.append(requests)
        if self.deaths:
            self.deaths -= 1
            raise ActorDiedError()
        return [s.to_bytes() for s in self.local.signals(requests)]  # type: ignore[union-attr]

    def _ready(self) -> None:
        if not self.back.wait(0.01):
            raise TimeoutError


class Method:
    def __init__(self, call: Any) -> None:
        self.call = call

    def remote(self, *given: Any) -> Method:
        self.given = given
        return self

    def result(self, timeout_s: float) -> Any:
        return self.call(*self.given)

    def cancel(self) -> None: ...


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_remote_is_local_at_equal_k(family: str) -> None:
    """For a request that wants the whole distribution, the remote reference sends its own k."""
    reference, target = LocalReference(model(f"rcd/{family}_ref_tiny")), model(f"{family}_tiny")
    remote = RemoteReference(Handle(f"rcd/{family}_ref_tiny"), top_k=16)  # type: ignore[arg-type]
    settings = DecodeSettings(
        block_length=4, max_new_tokens=12, residual=True, start="reference", stop_token_ids=(), temperature=0.8, seed=1
    )
    sparse = replace(settings, residual_top_k=16)
    local = Decoder(target, reference).generate([[3, 4, 5], [9]], sparse)
    assert Decoder(target, remote).generate([[3, 4, 5], [9]], sparse) == local  # type: ignore[arg-type]
    assert remote.shape == shape_of(reference.model)
    [signals] = remote.submit([replace(REQUEST, top_k=None)])
    assert signals.result(timeout=20).topk_ids.shape[-1] == 16  # type: ignore[union-attr]


def test_blocks_of_a_request_share_a_session() -> None:
    handle = Handle()
    remote = RemoteReference(handle, top_k=16, sessions=4)  # type: ignore[arg-type]
    requests = [replace(REQUEST, canvas_ids=(5, n, 511, 511), session=n) for n in range(6)]
    signals = [future.result(timeout=20) for future in remote.submit(requests)]
    groups = {tuple(request.session for request in call) for call in handle.calls}  # a slow one is asked again
    assert groups == {(0, 4), (1, 5), (2,), (3,)}
    assert len(set(handle.sessions)) == 5, "one for each group, and one for second tries"
    alone = handle.local.signals(requests)
    assert all(torch.equal(a.topk_ids, b.topk_ids) for a, b in zip(signals, alone, strict=True))  # type: ignore[union-attr]


def test_one_death_is_retried_and_two_give_no_signals() -> None:
    handle = Handle(deaths=1)
    remote = RemoteReference(handle, top_k=16)  # type: ignore[arg-type]
    assert all(f.result(timeout=20) is not None for f in remote.submit([REQUEST, REQUEST]))
    assert [len(call) for call in handle.calls] == [2, 2]

    handle.deaths = 2
    [nothing] = remote.submit([REQUEST])
    assert nothing.result(timeout=20) is None and len(handle.calls) == 4
    [silent] = remote.submit([REQUEST])
    assert silent.result(timeout=20) is None and len(handle.calls) == 4, "no call before a replica is ready again"
    handle.back.set()
    until(lambda: remote.submit([REQUEST])[0].result(timeout=20) is not None, seconds=20)
