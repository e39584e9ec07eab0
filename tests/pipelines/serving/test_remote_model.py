"""Lost replicas, also when replicas with another checkpoint follow, over real engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError

from pipelines.serving.backend import DecodeRequest, DecodingFailed, Finished, TextDelta, TraceStep, Unavailable
from pipelines.serving.engine_thread import EngineThread
from pipelines.serving.http.errors import api_error
from pipelines.serving.remote_model import RemoteModel
from pipelines.serving.target import Target, weights_id
from rcd_core import Decoder
from rcd_core.decode_settings import DecodeSettings
from rcd_core.errors import UserError
from tests.pipelines.serving.served_app import _model, served

SETTINGS = DecodeSettings(max_new_tokens=40, temperature=1.0, seed=3, stop_token_ids=(), confidence_threshold=0.5)
REQUEST = DecodeRequest(
    prompt="the fox", messages=None, infill=False, settings=SETTINGS, fixed_length=True, stop=(), streamed=True
)
ALL = 1000  # batches: the replica survives


@pytest.fixture(scope="module")
def replicas() -> Iterator[dict[str, Target]]:
    """ "old" and "new", which differ in their weights only."""
    with served() as app:
        targets = {}
        for name, engine in zip(("old", "new"), app.engines.values(), strict=True):
            target = targets[name] = object.__new__(Target)  # its constructor needs Ray Serve
            target.engine, target.checkpoint = engine, weights_id(engine.model)
        yield targets


class _Batches:
    """The answer of a replica that dies after some batches."""

    def __init__(self, items: Any, lives: int) -> None:
        self.items, self.lives = items, lives

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._alive()

    async def _alive(self) -> AsyncIterator[Any]:
        async for item in self.items:
            if not self.lives:
                raise ActorDiedError()
            self.lives -= 1
            yield item

    def cancel(self) -> None: ...


class Handle:
    """Of a deployment: each call goes to the next of `lives`, a replica and the batches after which it dies."""

    def __init__(self, *lives: tuple[Target, int]) -> None:
        self.lives, self.requests = list(lives), list[DecodeRequest]()
        self.stream = self

    def options(self, stream: bool, _by_reference: bool) -> Handle:
        return self

    def remote(self, request: DecodeRequest) -> _Batches:
        self.requests.append(request)
        replica, batches = self.lives.pop(0)
        return _Batches(replica.stream(request), batches)


def events_of(handle: Handle, request: DecodeRequest) -> list[Any]:
    """The events, followed by Unavailable if the stream ends with it."""

    async def collect() -> list[Any]:
        events: list[Any] = []
        try:
            async for event in RemoteModel(handle).stream(request):  # type: ignore[arg-type]
                events.append(event)
        except Unavailable as error:
            events.append(error)
        return events

    return asyncio.run(collect())


def text_of(replica: Target, settings: DecodeSettings = SETTINGS) -> str:
    engine: EngineThread = replica.engine
    ids = engine.tokenizer("the fox", add_special_tokens=False)["input_ids"]
    [alone] = Decoder(engine.model).generate([ids], settings)
    return str(engine.tokenizer.decode(alone.token_ids, skip_special_tokens=True))


def sent(events: list[Any]) -> str:
    return "".join(e.text for e in events if isinstance(e, TextDelta))


def test_a_stream_resumes_with_the_same_checkpoint(replicas: dict[str, Target]) -> None:
    old, new = replicas["old"], replicas["new"]
    assert text_of(old) != text_of(new) and old.checkpoint != new.checkpoint
    handle = Handle((old, 2), (old, ALL))
    events = events_of(handle, REQUEST)
    assert sent(events) == text_of(old) and isinstance(events[-1], Finished)
    assert handle.requests[1].committed and handle.requests[1].num_sent > 0


def test_a_stream_with_text_never_mixes_two_checkpoints(replicas: dict[str, Target]) -> None:
    old, new = replicas["old"], replicas["new"]
    events = events_of(Handle((old, 2), (new, ALL)), REQUEST)
    assert isinstance(events[-1], Unavailable)
    assert sent(events) and text_of(old).startswith(sent(events))


def test_a_stream_with_steps_never_mixes_two_checkpoints(replicas: dict[str, Target]) -> None:
    old, new = replicas["old"], replicas["new"]
    traced = replace(REQUEST, settings=replace(SETTINGS, trace=True))
    events = events_of(Handle((old, 1), (new, ALL)), traced)
    assert isinstance(events[0], TraceStep) and isinstance(events[-1], Unavailable) and not sent(events)


def test_an_answer_that_nobody_has_seen_restarts(replicas: dict[str, Target]) -> None:
    """A stream before its first text, and an answer without stream at any time."""
    old, new = replicas["old"], replicas["new"]
    events = events_of(Handle((old, 0), (new, ALL)), REQUEST)
    assert sent(events) == text_of(new) and isinstance(events[-1], Finished)
    for settings in (SETTINGS, replace(SETTINGS, trace=True)):
        request = replace(REQUEST, streamed=False, settings=settings)
        handle = Handle((old, 2), (new, ALL), (new, ALL))
        [whole], [alone] = events_of(handle, request), events_of(Handle((new, ALL)), request)
        assert isinstance(whole, Finished) and whole == alone and whole.result.text == text_of(new)
        assert not handle.lives and bool(handle.requests[1].committed) != settings.trace
    # A stream whose text is held back, because it may begin a stop string.
    held = replace(REQUEST, stop=(text_of(old)[:20] + "\0",))
    events = events_of(Handle((old, 2), (new, ALL), (new, ALL)), held)
    assert sent(events) == text_of(new) and isinstance(events[-1], Finished)


def test_the_work_of_one_checkpoint_never_reaches_another(replicas: dict[str, Target]) -> None:
    """The other vocabulary may lack its ids. Nor is it the client's fault if the request no longer fits."""
    old = replicas["old"]
    new = object.__new__(Target)
    with served() as app:
        new.engine, new.checkpoint = next(iter(app.engines.values())), "another"
        new.engine.text.max_length = 16
        events = events_of(Handle((old, 2), (new, ALL)), REQUEST)
        assert isinstance(events[-1], Unavailable) and sent(events)
        with pytest.raises(UserError, match="^max_tokens "):
            events_of(Handle((old, 0), (new, ALL)), REQUEST)
        new.engine.text.max_length = 256
        tokenized = list[Any]()
        new.engine.text.sequence = tokenized.append  # type: ignore[assignment,method-assign]
        events_of(Handle((old, 2), (new, ALL)), REQUEST)
        assert not tokenized


def test_weights_id_identifies_weights_and_settings(replicas: dict[str, Target]) -> None:
    tokenizer = replicas["old"].engine.tokenizer
    one = _model(tokenizer, 0)
    assert weights_id(one) == weights_id(_model(tokenizer, 0)) == replicas["old"].checkpoint
    one.info.rcd["alpha_scale"] = 1.5
    assert weights_id(one) != replicas["old"].checkpoint
    one.info.rcd.clear()
    assert weights_id(one) == replicas["old"].checkpoint
    one.embedding.weight.data[3, 4] *= 1.0001
    assert weights_id(one) != replicas["old"].checkpoint
    assert len(weights_id(one.bfloat16())) == 16


def test_predictions_that_are_not_finite_fail_the_request_with_the_place(replicas: dict[str, Target]) -> None:
    """The message that HTTP clients get, after one try; the engine goes on."""
    old = replicas["old"]
    weights = old.engine.model.lm_head_weight
    sound = weights.detach().clone()
    handle = Handle((old, ALL))
    with torch.no_grad():
        weights[:] = float("nan")
        try:
            with pytest.raises(DecodingFailed, match=f"{old.engine.model.name}.*the head") as failed:
                events_of(handle, REQUEST)
        finally:
            weights[:] = sound
    assert api_error(failed.value).status == 500 and "the head" in str(api_error(failed.value))
    assert sent(events_of(Handle((old, ALL)), REQUEST)) == text_of(old)
