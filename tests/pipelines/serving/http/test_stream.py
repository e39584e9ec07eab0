"""Streams over a real socket: what OpenAI's client reads, the framing line by line, and what ends a stream early."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from pipelines.serving.backend import ServedModel
from pipelines.serving.http.app import create_app
from pipelines.serving.http.guard import ApiLimits
from rcd_core.decode_settings import DecodeSettings
from tests.pipelines.serving.http.fake_backend import STEP, Echo

MESSAGES: Any = [{"role": "user", "content": "hello"}]
REPLY = f"<{MESSAGES}>"


@pytest.fixture(scope="module")
def echo() -> Echo:
    return Echo()


@pytest.fixture(scope="module")
def url(echo: Echo) -> Iterator[str]:
    models = {"m": ServedModel(backend=echo, defaults=DecodeSettings(), created=7)}
    app = create_app(models, {"key": "k"}, ApiLimits(ping_s=0.05))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


def events(url: str, path: str = "completions", **body: Any) -> list[str]:
    """The events of a stream as they are on the wire, pings left out."""
    content = {"prompt": "hello"} if path == "completions" else {"messages": MESSAGES}
    answer = httpx.post(f"{url}/v1/{path}", json={"model": "m", "stream": True, **content, **body}, timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = answer.text.split("\n\n")
    assert found.pop() == "" and all("\n" not in event for event in found)
    return [event for event in found if not event.startswith(":")]


def chunks(found: list[str]) -> list[dict[str, Any]]:
    assert found[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in found[:-1]]


def eventually_idle(echo: Echo) -> bool:
    deadline = time.monotonic() + 10
    while echo.open and time.monotonic() < deadline:
        time.sleep(0.01)
    return echo.open == 0


def test_the_client_reads_a_completion(client: openai.OpenAI) -> None:
    found = list(client.completions.create(model="m", prompt="hello", stream=True, max_tokens=9, seed=3))
    assert "".join(c.choices[0].text for c in found) == "<hello>" and len(found) == 5
    assert [c.choices[0].finish_reason for c in found] == [None] * 4 + ["stop"]  # type: ignore[comparison-overlap]
    assert len({c.id for c in found}) == 1 and found[0].object == "text_completion"
    assert found[-1].model_extra is not None and "rcd" not in (found[0].model_extra or {})
    rcd = found[-1].model_extra["rcd"]
    assert rcd["forwards"]["denoise"] == 4 and rcd["tokens_per_forward"] == 2.0 and rcd["reference_failures"] == 2
    assert rcd["settings"]["max_new_tokens"] == 9 and rcd["settings"]["seed"] == 3


def test_the_client_reads_a_chat_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    found = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in found[:-1]) == REPLY
    assert found[0].choices[0].delta.role == "assistant" and found[-2].choices[0].finish_reason == "stop"
    assert found[-1].choices == [] and found[-1].usage is not None and found[-1].usage.total_tokens == 11
    whole = client.chat.completions.create(model="m", messages=MESSAGES)
    assert whole.choices[0].message.content == REPLY and whole.usage == found[-1].usage
    assert [m.id for m in client.models.list().data] == ["m"] and client.models.retrieve("m").created == 7


def test_the_chunks_of_a_chat_come_in_openais_order(url: str) -> None:
    found = chunks(events(url, "chat/completions", stream_options={"include_usage": True}))
    choices = [c["choices"][0] for c in found[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(c["delta"]) == {"content"} and c["finish_reason"] is None for c in choices[1:-1])
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "stop"
    assert {c["object"] for c in found} == {"chat.completion.chunk"}
    assert all(c["usage"] is None and "rcd" not in c for c in found[:-1])
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 8
    assert found[-1]["rcd"]["forwards"]["denoise"] == 4
    assert choices[-1]["rcd"] == {"seed": 11, "forwards": found[-1]["rcd"]["forwards"], "reference_failures": 2}


def test_choices_come_interleaved_by_their_index(url: str, echo: Echo) -> None:
    found = chunks(events(url, prompt=["abcdef", "uvwxyz"], n=2, seed=5))
    texts, ended, order = ["", "", "", ""], [], []
    for chunk in found:
        [choice] = chunk["choices"]
        order.append(choice["index"])
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            ended.append(choice["index"])
    assert texts == ["<abcdef>", "<abcdef>", "<uvwxyz>", "<uvwxyz>"] and sorted(ended) == [0, 1, 2, 3]
    assert order != sorted(order)
    assert ["rcd" in c for c in found] == [False] * (len(found) - 1) + [True]
    assert sorted(c["choices"][0]["rcd"]["seed"] for c in found if c["choices"][0]["finish_reason"]) == [5, 5, 6, 6]
    assert not any(r.settings.trace for r in echo.asked[-4:])


@pytest.mark.parametrize("detail", ["steps", "summary"])
def test_the_trace_comes_pass_by_pass(url: str, client: openai.OpenAI, detail: str) -> None:
    short = {
        "num_masked": 2,
        "num_committed": 1,
        "mean_confidence": 0.625,
        "mean_entropy": 0.75,
        "mean_alpha": 0.375,
    }
    expected = STEP if detail == "steps" else short
    found = chunks(events(url, return_trace=detail))
    traces = [c["rcd"] for c in found if not c["choices"]]
    assert traces == [{"type": "trace", "index": 0, "pass": i, "step": expected} for i in range(4)]
    assert found[0]["choices"] == [] and found[1]["choices"][0]["text"] == "<h"
    whole = client.completions.create(model="m", prompt="hello", extra_body={"return_trace": detail})
    assert whole.choices[0].model_extra is not None
    assert whole.choices[0].model_extra["rcd"]["steps"] == [expected] * 4


def test_what_fails_on_the_way_ends_with_an_error_event(url: str, client: openai.OpenAI) -> None:
    found = events(url, prompt="lost on the way")
    assert json.loads(found[0].removeprefix("data: "))["choices"][0]["text"] == "<l"
    error = json.loads(found[-1].removeprefix("data: "))["error"]
    assert error == {"message": "the replica was lost", "type": "server_error", "param": None, "code": "unavailable"}
    with pytest.raises(openai.APIError, match="the replica was lost"):
        list(client.completions.create(model="m", prompt="lost on the way", stream=True))


@pytest.mark.parametrize("prompt", ["no result", "two texts"])
def test_a_model_that_breaks_its_word_is_no_whole_answer(url: str, prompt: str) -> None:
    found = events(url, prompt=prompt)
    assert json.loads(found[-1].removeprefix("data: "))["error"]["message"].startswith("the server failed")
    assert httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": prompt}).status_code == 500


def test_what_is_refused_at_once_has_a_status(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="this model refuses it"):
            client.completions.create(model="m", prompt="forbidden", stream=stream)
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model="m", prompt=["fine", "full"], stream=stream)
        assert full.value.response.headers["Retry-After"] == "2" and full.value.code == "queue_full"
        with pytest.raises(openai.InternalServerError, match="RuntimeError"):
            client.completions.create(model="m", prompt="broken", stream=stream)


def test_a_stream_with_nothing_to_say_pings(url: str) -> None:
    with httpx.stream("POST", f"{url}/v1/completions", json={"model": "m", "prompt": "forever", "stream": True}) as r:
        lines = [line for line, _ in zip(r.iter_lines(), range(6), strict=False)]
    assert lines[0].startswith("data: ") and lines[2] == ": ping" and lines[4] == ": ping"


def test_the_deadline_is_an_error_of_ours(url: str, client: openai.OpenAI, echo: Echo) -> None:
    with pytest.raises(openai.InternalServerError) as late:
        client.completions.create(model="m", prompt="forever", extra_body={"timeout_s": 0.2})
    assert late.value.status_code == 504 and late.value.code == "timeout" and "0.2 s" in str(late.value)
    found = events(url, prompt="forever", timeout_s=0.2)
    assert json.loads(found[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    assert eventually_idle(echo)


def test_readers_that_leave_cancel_their_requests(url: str, echo: Echo) -> None:
    body = {"model": "m", "prompt": ["forever"] * 3, "n": 2, "stream": True}
    for _ in range(5):
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ") and echo.open >= 6
    assert eventually_idle(echo)


def test_a_client_that_stops_waiting_cancels_its_requests(url: str, echo: Echo) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": ["forever"] * 3, "n": 2}, timeout=0.3)
    assert eventually_idle(echo)
