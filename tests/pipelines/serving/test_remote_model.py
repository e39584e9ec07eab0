"""What the front makes of replicas that are lost and followed by ones of another checkpoint, over real engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from pipelines.serving.backend import DecodeEvent, DecodeRequest, Finished, TextDelta, TraceStep, Unavailable
from pipelines.serving.engine_thread import EngineThread
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
ALL = 1000  # batches: the replica lives on


@pytest.fixture(scope="module")
def replicas() -> Iterator[dict[str, Target]]:
    """Two that differ in their weights only, "old" and "new"."""
    with served() as app:
        made = {}
        for name, engine in zip(("old", "new"), app.engines.values(), strict=True):
            made[name] = object.__new__(Target)  # its constructor wants a Serve around it
            made[name].engine, made[name].checkpoint = engine, weights_id(engine.model)
        yield made


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
        self.lives, self.asked = list(lives), list[DecodeRequest]()
        self.stream = self

    def options(self, stream: bool, _by_reference: bool) -> Handle:
        return self

    def remote(self, request: DecodeRequest) -> _Batches:
        self.asked.append(request)
        replica, batches = self.lives.pop(0)
        return _Batches(replica.stream(request), batches)


def told(handle: Handle, request: DecodeRequest) -> list[DecodeEvent]:
    """The events; one that fails ends them."""

    async def collect() -> list[DecodeEvent]:
        found = []
        try:
            async for event in RemoteModel(handle).stream(request):  # type: ignore[arg-type]
                found.append(event)
        except Unavailable as error:
            found.append(error)  # type: ignore[arg-type]
        return found

    return asyncio.run(collect())


def text_of(replica: Target, settings: DecodeSettings = SETTINGS) -> str:
    engine: EngineThread = replica.engine
    ids = engine.tokenizer("the fox", add_special_tokens=False)["input_ids"]
    [found] = Decoder(engine.model).generate([ids], settings)
    return str(engine.tokenizer.decode(found.token_ids, skip_special_tokens=True))


def said(events: list[DecodeEvent]) -> str:
    return "".join(e.text for e in events if isinstance(e, TextDelta))


def test_the_checkpoints_answer_differently(replicas: dict[str, Target]) -> None:
    assert text_of(replicas["old"]) != text_of(replicas["new"])
    assert replicas["old"].checkpoint != replicas["new"].checkpoint


def test_a_stream_goes_on_with_the_same_checkpoint(replicas: dict[str, Target]) -> None:
    old = replicas["old"]
    handle = Handle((old, 2), (old, ALL))
    events = told(handle, REQUEST)
    assert said(events) == text_of(old) and isinstance(events[-1], Finished)
    assert handle.asked[1].committed and handle.asked[1].told > 0


def test_a_stream_with_text_ends_rather_than_mix_two_checkpoints(replicas: dict[str, Target]) -> None:
    old, new = replicas["old"], replicas["new"]
    events = told(Handle((old, 2), (new, ALL)), REQUEST)
    assert isinstance(events[-1], Unavailable) and "replaced" in str(events[-1])
    assert said(events) and text_of(old).startswith(said(events))


def test_a_stream_with_passes_told_ends_too(replicas: dict[str, Target]) -> None:
    old, new = replicas["old"], replicas["new"]
    traced = replace(REQUEST, settings=replace(SETTINGS, trace=True))
    events = told(Handle((old, 1), (new, ALL)), traced)
    assert isinstance(events[0], TraceStep) and isinstance(events[-1], Unavailable) and not said(events)


def test_what_nobody_has_seen_begins_anew(replicas: dict[str, Target]) -> None:
    """A stream before its first text, and an answer that comes in one piece at any time."""
    old, new = replicas["old"], replicas["new"]
    events = told(Handle((old, 0), (new, ALL)), REQUEST)
    assert said(events) == text_of(new) and isinstance(events[-1], Finished)
    for settings in (SETTINGS, replace(SETTINGS, trace=True)):
        request = replace(REQUEST, streamed=False, settings=settings)
        handle = Handle((old, 2), (new, ALL), (new, ALL))
        [whole], [alone] = told(handle, request), told(Handle((new, ALL)), request)
        assert isinstance(whole, Finished) and whole == alone and whole.result.text == text_of(new)
        assert not handle.lives and bool(handle.asked[1].committed) != settings.trace
    # A stream of which only held back text is known: the beginning of a stop string.
    held = replace(REQUEST, stop=(text_of(old)[:20] + "\0",))
    events = told(Handle((old, 2), (new, ALL), (new, ALL)), held)
    assert said(events) == text_of(new) and isinstance(events[-1], Finished)


def test_the_work_of_one_checkpoint_never_reaches_another(replicas: dict[str, Target]) -> None:
    """Its ids may not be in the vocabulary; nor is it the client's mistake if the request does not fit any more."""
    old = replicas["old"]
    new = object.__new__(Target)
    with served() as app:
        new.engine, new.checkpoint = next(iter(app.engines.values())), "another"
        new.engine.text.max_length = 16
        events = told(Handle((old, 2), (new, ALL)), REQUEST)
        assert isinstance(events[-1], Unavailable) and said(events)
        with pytest.raises(UserError, match="there is room for"):
            told(Handle((old, 0), (new, ALL)), REQUEST)
        new.engine.text.max_length = 256
        seen = list[Any]()
        new.engine.text.sequence = seen.append  # type: ignore[assignment,method-assign]
        told(Handle((old, 2), (new, ALL)), REQUEST)
        assert not seen


def test_the_id_is_of_the_weights(replicas: dict[str, Target]) -> None:
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
