"""Invalid bodies of every kind get a 4xx answer in OpenAI's error shape."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from httpx_sse import EventSource
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from pipelines.serving.http.bodies import ChatRequest, CompletionRequest
from pipelines.serving.http.guard import ApiLimits
from tests.pipelines.serving.http.fake_backend import app_of
from tests.pipelines.serving.served_app import listening

CLIENT = TestClient(app_of())  # raises what the application does not catch
PATHS = {"/v1/completions": '"prompt": "p"', "/v1/chat/completions": '"messages": [{"role": "user", "content": "p"}]'}
HALF_PAIR = r'"\ud800"'


def post(path: str, body: bytes, content_type: str = "application/json") -> Any:
    return CLIENT.post(path, content=body, headers={"Content-Type": content_type})


def check_refused(answer: Any) -> None:
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"17",
        b'{"model": "m",}',
        b'{"model": "m"} {}',
        b"\xff\xfe\x00",
        b"\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 10_000,
        b'{"model": "m", "\\ud800": 1}',
        b'{"model": null}',
    ],
    ids=lambda b: repr(b[:20]),
)
def test_a_body_that_is_no_request_is_rejected(path: str, body: bytes) -> None:
    check_refused(post(path, body))


def test_json_needs_its_content_type() -> None:
    """Any web page may send plain text to this server without asking it first, but not JSON."""
    body = b'{"model": "m", "prompt": "p"}'
    answer = post("/v1/completions", body, "text/plain")
    check_refused(answer)
    assert "application/json" in answer.json()["error"]["message"]
    assert post("/v1/completions", body).status_code == 200


BAD_VALUES = {
    "confidence_threshold": ["NaN"],
    "temperature": ["Infinity", "-Infinity", "1e400", '"0.5"'],
    "timeout_s": ["NaN"],
    "max_tokens": ["1e400", "1.5", "true", '"9"', f"{10**30}"],
    "top_k": [f"{2**31}"],
    "seed": [f"{2**63}", f"1{'0' * 5000}"],
    "block_length": [f"-{10**30}"],
    "stop_token_ids": ["[-1]", f"[{10**30}]", "3"],
    "n": ["129"],
    "stream": ['"yes"'],
    "residual": ["1"],
    "stop": [HALF_PAIR, f'["a", {HALF_PAIR}]', '[["a"]]'],
    "stream_options": ['{"include_usage": true, "x": 1}, "stream": true'],
    "logprobs": ["21"],
    **dict.fromkeys(("tools", r"\u0000", r"\ud800"), ["1"]),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", [f'"{name}": {value}' for name, values in BAD_VALUES.items() for value in values])
def test_an_invalid_field_is_rejected(path: str, field: str) -> None:
    answer = post(path, f'{{"model": "m", {PATHS[path]}, {field}}}'.encode())
    check_refused(answer)
    error = answer.json()["error"]
    assert error["param"] or error["code"] == "unknown_field" or "parsing the body" in error["message"]


BAD_PROMPTS = ["[]", "{}", "7", "[true]", "[-1]", f"[{2**31}]", f"[{10**30}]", "[5000]", "[1.5]", '[1, "a"]', "[[[1]]]"]


@pytest.mark.parametrize("prompt", [*BAD_PROMPTS, HALF_PAIR])
def test_an_invalid_prompt_is_rejected(prompt: str) -> None:
    check_refused(post("/v1/completions", f'{{"model": "m", "prompt": {prompt}}}'.encode()))


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ('{"role": "tool", "content": "x"}', "messages.0.role"),
        ('{"role": "user", "content": 5}', "messages.0.content"),
        ('{"role": "user", "content": [{"type": "image_url", "text": "x"}]}', "messages.0.content"),
        ('{"role": "user"}', "messages.0.content"),
        (f'{{"role": "user", "content": {HALF_PAIR}}}', "messages.0.content"),
        ('{"role": "user", "content": "x", "name": 5}', "messages.0.name"),
        ('{"role": "user", "content": "x", "nmae": "y"}', "messages.0.nmae"),
        ('{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}', "messages.0.tool_calls"),
        ('{"role": "assistant", "content": "x", "refusal": "no"}', "messages.0.refusal"),
        ("5", "messages.0"),
    ],
)
def test_an_invalid_message_is_named(message: str, param: str) -> None:
    answer = post("/v1/chat/completions", f'{{"model": "m", "messages": [{message}]}}'.encode())
    check_refused(answer)
    assert answer.json()["error"]["param"].startswith(param), answer.text


def test_control_characters_are_text() -> None:
    odd = "\0\x01\x1b[2J\r\n\u2028\u202e\U0001f600"
    answer = CLIENT.post("/v1/completions", json={"model": "m", "prompt": odd, "stop": ["\0"]})
    assert answer.json()["choices"][0]["text"] == f"<{odd}>"
    stream = CLIENT.post("/v1/completions", json={"model": "m", "prompt": odd, "stream": True})
    *chunks, done = [event.data for event in EventSource(stream).iter_sse()]
    assert "".join(json.loads(c)["choices"][0]["text"] for c in chunks) == f"<{odd}>" and done == "[DONE]"


NUMBERS = st.integers() | st.floats() | st.sampled_from([2**31, 2**63, -(2**63), 10**40, 1e308, 5e-324])
TEXTS = st.text(st.characters(), max_size=8) | st.sampled_from(["m", "none", "zero", "\0", "\ud800", "forbidden"])
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


KEY = "s3cret"
PREFIXED = TestClient(app_of(ApiLimits(api_keys=(KEY,))), root_path="/rcd")
ROUTES = ["/", "/v1/models", "/v1/models/m", "/version", "/openapi.json", "/health", "/ready", "/metrics"]
FILES = ["/playground", "/playground/models.json", "/playground/main.js", "/playground/../v1/models"]
PIECES = st.sampled_from(["", "/", "//", "/rcd", "/v1", "/playground", "/..", "/%2e%2e", "%2f", "/.", ";x", "?x", "m"])
TARGETS = st.sampled_from([*PATHS, *ROUTES, *FILES]) | st.lists(PIECES, min_size=1, max_size=5).map("".join)
METHODS = st.sampled_from(["POST", "POST", "GET", "GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"])
AUTHORIZATION = st.sampled_from([None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x"])


def fuzz_under_a_prefix(base: str, client: Any, data: st.DataObject, *, with_key: bool) -> None:
    """One request. Whatever it is, there is no 500, and without a key only the page and its files are answered."""
    target, method = data.draw(TARGETS), data.draw(METHODS)
    body = data.draw(st.dictionaries(st.sampled_from([*CompletionRequest.model_fields, "messages"]), JUNK, max_size=3))
    if data.draw(st.booleans()):
        body = {"model": "m", "prompt": "p", "messages": [{"role": "user", "content": "p"}]} | body
    sent = f"Bearer {KEY}" if with_key else data.draw(AUTHORIZATION)
    headers = {"Content-Type": "application/json"} | ({} if sent is None else {"Authorization": sent})
    content = json.dumps(body).encode() if data.draw(st.integers(0, 9)) else data.draw(st.binary(max_size=20))
    answer = client.request(method, f"{base}{target or '/'}", content=content, headers=headers, follow_redirects=False)
    assert answer.status_code < 500 or (answer.status_code == 503 and target == "/ready"), answer.text
    if not with_key and answer.status_code < 400:
        page = answer.headers.get("Content-Type", "").startswith(("text/html", "text/css", "text/javascript", "image/"))
        assert page or answer.status_code in (301, 302, 307, 308), (target, answer.headers)


@pytest.mark.parametrize("with_key", [False, True])
@settings(max_examples=40, derandomize=True, database=None, deadline=None)
@given(data=st.data())
def test_random_requests_under_a_prefix(with_key: bool, data: st.DataObject) -> None:
    fuzz_under_a_prefix("/rcd", PREFIXED, data, with_key=with_key)


@pytest.mark.drill
@pytest.mark.parametrize("with_key", [False, True])
def test_two_thousand_random_requests_under_a_prefix(with_key: bool) -> None:
    """By real HTTP, half of them in each case."""
    app = Starlette(routes=[Mount("/rcd", app=app_of(ApiLimits(api_keys=(KEY,))))])

    with listening(app) as url, httpx.Client(trust_env=False, timeout=30) as client:

        @settings(max_examples=1000, derandomize=True, database=None, deadline=None)
        @given(data=st.data())
        def fuzz(data: st.DataObject) -> None:
            fuzz_under_a_prefix(f"{url}/rcd", client, data, with_key=with_key)

        fuzz()


@settings(max_examples=400, derandomize=True, database=None, deadline=None)
@given(data=st.data())
def test_random_values_get_an_answer_or_a_refusal(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(list(PATHS)))
    model = CompletionRequest if path == "/v1/completions" else ChatRequest
    names = st.sampled_from([*model.model_fields, "unknown"])
    body = json.loads(f'{{"model": "m", {PATHS[path]}}}') | data.draw(st.dictionaries(names, JUNK, max_size=3))
    answer = post(path, json.dumps(body).encode())
    if answer.status_code != 200:
        check_refused(answer)
