"""Streams over a real socket: the OpenAI client, the order of chunks, and streams that end early."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import openai
import pytest
from httpx_sse import EventSource

from pipelines.serving.http.guard import ApiLimits
from pipelines.serving.http.sse import EventStream
from tests.pipelines.serving.http.fake_backend import STEP, Echo, app_of
from tests.pipelines.serving.served_app import listening

MESSAGES: Any = [{"role": "user", "content": "hello"}]
REPLY = f"<{MESSAGES}>"


@pytest.fixture(scope="module")
def echo() -> Echo:
    return Echo()


@pytest.fixture(scope="module")
def url(echo: Echo) -> Iterator[str]:
    with listening(app_of(ApiLimits(ping_s=0.05), m=echo)) as url:
        yield url


@pytest.fixture
def api(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


def events(url: str, path: str = "completions", **body: Any) -> list[str]:
    """The data of the events of a stream."""
    content = {"prompt": "hello"} if path == "completions" else {"messages": MESSAGES}
    answer = httpx.post(f"{url}/v1/{path}", json={"model": "m", "stream": True, **content, **body}, timeout=30)
    assert answer.status_code == 200, answer.text
    return [event.data for event in EventSource(answer).iter_sse()]


def chunks(data: list[str]) -> list[dict[str, Any]]:
    assert data[-1] == "[DONE]"
    return [json.loads(chunk) for chunk in data[:-1]]


def error_of(data: list[str]) -> dict[str, Any]:
    """The error event that ends a stream."""
    error: dict[str, Any] = json.loads(data[-1])["error"]
    return error


def becomes_idle(echo: Echo) -> bool:
    deadline = time.monotonic() + 10
    while echo.open and time.monotonic() < deadline:
        time.sleep(0.01)
    return echo.open == 0


def test_openai_client_reads_a_completion(api: openai.OpenAI) -> None:
    received = list(api.completions.create(model="m", prompt="hello", stream=True, max_tokens=9, seed=3))
    assert "".join(c.choices[0].text for c in received) == "<hello>" and len(received) == 5
    assert [c.choices[0].finish_reason for c in received] == [None] * 4 + ["stop"]  # type: ignore[comparison-overlap]
    assert len({c.id for c in received}) == 1 and received[0].object == "text_completion"
    assert received[-1].model_extra is not None and "rcd" not in (received[0].model_extra or {})
    rcd = received[-1].model_extra["rcd"]
    assert rcd["forwards"]["denoise"] == 4 and rcd["tokens_per_forward"] == 2.0 and rcd["reference_failures"] == 2
    assert rcd["settings"]["max_new_tokens"] == 9 and rcd["settings"]["seed"] == 3


def test_openai_client_reads_a_chat_with_usage(api: openai.OpenAI) -> None:
    stream = api.chat.completions.create(
        model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    received = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in received[:-1]) == REPLY
    assert received[0].choices[0].delta.role == "assistant" and received[-2].choices[0].finish_reason == "stop"
    assert received[-1].choices == [] and received[-1].usage is not None and received[-1].usage.total_tokens == 11
    whole = api.chat.completions.create(model="m", messages=MESSAGES)
    assert whole.choices[0].message.content == REPLY and whole.usage == received[-1].usage
    assert [m.id for m in api.models.list().data] == ["m"] and api.models.retrieve("m").created == 7


def test_chat_chunks_come_in_openai_order(url: str) -> None:
    received = chunks(events(url, "chat/completions", stream_options={"include_usage": True}))
    choices = [c["choices"][0] for c in received[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(c["delta"]) == {"content"} and c["finish_reason"] is None for c in choices[1:-1])
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "stop"
    assert {c["object"] for c in received} == {"chat.completion.chunk"}
    assert all(c["usage"] is None and "rcd" not in c for c in received[:-1])
    assert received[-1]["choices"] == [] and received[-1]["usage"]["completion_tokens"] == 8
    assert received[-1]["rcd"]["forwards"]["denoise"] == 4
    assert choices[-1]["rcd"] == {"seed": 11, "forwards": received[-1]["rcd"]["forwards"], "reference_failures": 2}


def test_choices_are_interleaved(url: str, echo: Echo) -> None:
    received = chunks(events(url, prompt=["abcdef", "uvwxyz"], n=2, seed=5))
    texts, ended, order = ["", "", "", ""], [], []
    for chunk in received:
        [choice] = chunk["choices"]
        order.append(choice["index"])
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            ended.append((choice["index"], choice["rcd"]["seed"]))
    assert texts == ["<abcdef>", "<abcdef>", "<uvwxyz>", "<uvwxyz>"]
    assert sorted(ended) == [(0, 5), (1, 6), (2, 5), (3, 6)]
    assert order != sorted(order)
    assert ["rcd" in c for c in received] == [False] * (len(received) - 1) + [True]
    assert not any(r.settings.trace for r in echo.requests[-4:])


@pytest.mark.parametrize("detail", ["steps", "summary"])
def test_the_trace_comes_pass_by_pass(url: str, api: openai.OpenAI, detail: str) -> None:
    means = {"mean_confidence": 0.625, "mean_entropy": 0.75, "mean_alpha": 0.375}
    expected = STEP if detail == "steps" else {"num_masked": 2, "num_committed": 1, **means}
    received = chunks(events(url, return_trace=detail))
    traces = [c["rcd"] for c in received if not c["choices"]]
    assert traces == [{"type": "trace", "index": 0, "pass": i, "step": expected} for i in range(4)]
    assert received[0]["choices"] == [] and received[1]["choices"][0]["text"] == "<h"
    whole = api.completions.create(model="m", prompt="hello", extra_body={"return_trace": detail})
    assert whole.choices[0].model_extra is not None
    assert whole.choices[0].model_extra["rcd"]["steps"] == [expected] * 4


def test_a_late_failure_is_an_error_event(url: str, api: openai.OpenAI) -> None:
    data = events(url, prompt="lost")
    assert json.loads(data[0])["choices"][0]["text"] == "<l"
    assert error_of(data) == {
        "message": "the replica was lost",
        "type": "server_error",
        "param": None,
        "code": "unavailable",
    }
    with pytest.raises(openai.APIError, match="the replica was lost"):
        list(api.completions.create(model="m", prompt="lost", stream=True))


@pytest.mark.parametrize("prompt", ["no result", "two texts"])
def test_an_inconsistent_backend_fails_the_answer(url: str, prompt: str) -> None:
    assert error_of(events(url, prompt=prompt))["type"] == "server_error"
    assert httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": prompt}).status_code == 500


@pytest.mark.parametrize("stream", [False, True])
def test_an_early_refusal_has_a_status(api: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        api.completions.create(model="m", prompt="forbidden", stream=stream)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.RateLimitError) as full:
        api.completions.create(model="m", prompt=["fine", "full"], stream=stream)
    assert full.value.response.headers["Retry-After"] == "2" and full.value.code == "queue_full"
    with pytest.raises(openai.InternalServerError, match="RuntimeError"):
        api.completions.create(model="m", prompt="broken", stream=stream)


def test_a_silent_stream_sends_pings(url: str) -> None:
    with httpx.stream("POST", f"{url}/v1/completions", json={"model": "m", "prompt": "forever", "stream": True}) as r:
        assert r.headers["content-type"].startswith("text/event-stream")
        lines = [line for line, _ in zip(r.iter_lines(), range(6), strict=False)]
    assert lines[0].startswith("data: ") and lines[1::2] == [""] * 3 and lines[2::2] == [": ping"] * 2


def test_the_deadline_is_an_error(url: str, api: openai.OpenAI, echo: Echo) -> None:
    with pytest.raises(openai.InternalServerError) as late:
        api.completions.create(model="m", prompt="forever", extra_body={"timeout_s": 0.2})
    assert late.value.status_code == 504 and late.value.code == "timeout"
    assert error_of(events(url, prompt="forever", timeout_s=0.2))["code"] == "timeout"
    assert becomes_idle(echo)


def test_a_disconnect_cancels_the_request(url: str, echo: Echo) -> None:
    body = {"model": "m", "prompt": ["forever"] * 3, "n": 2, "stream": True}
    for _ in range(5):
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ") and echo.open >= 6
    assert becomes_idle(echo)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json={**body, "stream": False}, timeout=0.3)
    assert becomes_idle(echo)


def test_a_client_that_does_not_read_is_dropped_after_the_deadline() -> None:
    closed: list[str] = []

    async def content() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            closed.append("content")

    async def never(*_: Any) -> Any:
        await asyncio.sleep(60)

    async def respond() -> None:
        closing = AsyncExitStack()
        closing.callback(closed.append, "request")
        stream = EventStream(content(), closing, limit_s=0.2)
        sent = 0

        async def send(message: Any) -> None:  # the socket's buffer takes three parts
            nonlocal sent
            sent += 1
            if sent > 3:
                await never()

        await asyncio.wait_for(stream({"type": "http"}, never, send), 10)
        assert sent == 4

    asyncio.run(respond())
    assert closed == ["content", "request"]
