"""What is optional may be null, and there is one description of the API."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from pipelines.serving.http.bodies import ChatRequest, CompletionRequest
from rcd_core.decode_settings import DecodeSettings
from tests.pipelines.serving.http.fake_backend import Echo, client_of

DEFAULTS = DecodeSettings(confidence_threshold=0.9)
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"model": "m", "prompt": "p"}),
    "/v1/chat/completions": (ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "p"}]}),
}


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def client(echo: Echo) -> TestClient:
    return client_of(echo, DEFAULTS)


def optional(path: str) -> list[str]:
    return [name for name, field in BODIES[path][0].model_fields.items() if not field.is_required()]


@pytest.mark.parametrize("path", BODIES)
def test_null_is_as_good_as_left_out(client: TestClient, echo: Echo, path: str) -> None:
    body = BODIES[path][1]
    for given in ({}, dict.fromkeys(optional(path)), *({name: None} for name in optional(path))):
        answer = client.post(path, json=body | given)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
        assert len(answer.json()["choices"]) == 1 and "steps" not in answer.json()["choices"][0]["rcd"]
    assert len(set(map(repr, echo.asked))) == 1 and len(echo.asked) == 2 + len(optional(path))
    streamed = client.post(path, json=body | {"stream": True, "stream_options": {"include_usage": None}})
    assert streamed.text.endswith("data: [DONE]\n\n") and '"usage"' not in streamed.text


@pytest.mark.parametrize("path", BODIES)
def test_the_description_tells_of_it(client: TestClient, path: str) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    described = schemas[BODIES[path][0].__name__]["properties"]
    for name in optional(path):
        assert {"type": "null"} in described[name]["anyOf"], name
    assert {"type": "null"} in schemas["StreamOptions"]["properties"]["include_usage"]["anyOf"]


@pytest.mark.parametrize("path", BODIES)
def test_what_must_be_there_must_not_be_null(client: TestClient, path: str) -> None:
    body = BODIES[path][1]
    for name in body:
        answer = client.post(path, json=body | {name: None})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_openais_client_sends_null(client: TestClient, echo: Echo) -> None:
    sent: list[dict[str, Any]] = []
    client.event_hooks = {"request": [lambda request: sent.append(json.loads(request.content))]}
    asking: Any = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)
    nothing: dict[str, Any] = dict.fromkeys(
        ("n", "stream", "stream_options", "stop", "seed", "temperature", "top_p", "max_tokens")
    )
    answer = asking.completions.create(model="m", prompt="p", **nothing)
    assert answer.choices[0].text == "<p>"
    asking.chat.completions.create(model="m", messages=[{"role": "user", "content": "p"}], **nothing)
    assert all(body.items() >= nothing.items() for body in sent) and len(sent) == 2
    assert [r.settings for r in echo.asked] == [DEFAULTS] * 2


@pytest.mark.parametrize("path", ["/docs", "/docs/oauth2-redirect", "/redoc"])
def test_nothing_is_loaded_from_elsewhere(client: TestClient, path: str) -> None:
    """FastAPI's pages about an API take their scripts from another host."""
    answer = client.get(path)
    error = {"message": f"GET {path}: Not Found", "type": "invalid_request_error", "param": None, "code": None}
    assert (answer.status_code, answer.json()) == (404, {"error": error})
