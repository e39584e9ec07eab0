"""The HTTP interface over an echo: accepted and rejected requests, and the shape of every answer."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from pipelines.serving.http.bodies import DECODE_FIELDS, ChatRequest, CompletionRequest
from tests.pipelines.serving.http.fake_backend import DEFAULTS, STEP, Echo

BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"model": "m", "prompt": "p"}),
    "/v1/chat/completions": (ChatRequest, {"model": "m", "messages": [{"role": "user", "content": "p"}]}),
}


def complete(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/completions", json={"model": "m", "prompt": "p", **body})


def optional(path: str) -> list[str]:
    return [name for name, field in BODIES[path][0].model_fields.items() if not field.is_required()]


def test_models_and_states(client: TestClient) -> None:
    card = {"id": "m", "object": "model", "created": 7, "owned_by": "rcd"}
    assert client.get("/v1/models").json() == {"object": "list", "data": [card]}
    assert client.get("/v1/models/m").json() == card
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    assert client.get("/version").json() == {"version": "1.2", "key": "k"}


def test_completion_has_openai_shape_and_passes(client: TestClient) -> None:
    body = complete(client, seed=5).json()
    assert body["id"].startswith("cmpl-") and body["object"] == "text_completion" and body["model"] == "m"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"], choice["index"]) == ("<p>", "stop", 0)
    assert body["system_fingerprint"] == "k"
    assert body["rcd"]["forwards"] == {"prefill": 1, "denoise": 4, "store": 0, "reference": 1}
    assert body["rcd"]["tokens_per_forward"] == 2.0
    assert body["rcd"]["tokens_per_pass"] is None, "this backend does not know the reference's size"
    assert body["rcd"]["settings"]["confidence_threshold"] == 0.9 and body["rcd"]["settings"]["seed"] == 5
    assert body["rcd"]["reference_failures"] == 2 and body["rcd"]["seconds"] >= 0
    assert "steps" not in choice["rcd"]


def test_chat_has_openai_shape(client: TestClient, echo: Echo) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    body = client.post("/v1/chat/completions", json={"model": "m", "messages": messages}).json()
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert echo.requests[0].messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}]
    assert echo.requests[0].prompt is None


def test_settings_of_a_request_override_the_defaults(client: TestClient, echo: Echo) -> None:
    response = complete(client, confidence_threshold=0.5, temperature=0.7, stop_token_ids=[3], max_tokens=9, seed=None)
    assert response.status_code == 200
    assert echo.requests[0].settings == replace(
        DEFAULTS, confidence_threshold=0.5, temperature=0.7, stop_token_ids=(3,), max_new_tokens=9
    )
    assert echo.requests[0].fixed_length
    complete(client)
    assert echo.requests[1].settings == DEFAULTS and not echo.requests[1].fixed_length


def test_choices_of_prompts_and_n(client: TestClient, echo: Echo) -> None:
    largest = complete(client, n=2, seed=2**63 - 1).json()
    assert [c["rcd"]["seed"] for c in largest["choices"]] == [2**63 - 1, -(2**63)]
    body = complete(client, prompt=["a", "b"], n=2, seed=10, return_trace="steps").json()
    assert [c["text"] for c in body["choices"]] == ["<a>", "<a>", "<b>", "<b>"]
    assert [c["rcd"]["seed"] for c in body["choices"]] == [10, 11, 10, 11]
    assert body["choices"][0]["rcd"]["steps"] == [STEP, STEP]
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 32, "total_tokens": 38}
    assert body["rcd"]["forwards"]["denoise"] == 16
    complete(client, prompt=[[1, 2], [3]])
    complete(client, prompt=[4, 5])
    assert [r.prompt for r in echo.requests[-3:]] == [[1, 2], [3], [4, 5]]


# -- null


@pytest.mark.parametrize("path", BODIES)
def test_null_means_left_out(client: TestClient, echo: Echo, path: str) -> None:
    model, body = BODIES[path]
    assert set(DECODE_FIELDS) <= set(model.model_fields)
    for extra in ({}, dict.fromkeys(optional(path)), *({name: None} for name in optional(path))):
        answer = client.post(path, json=body | extra)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
        assert len(answer.json()["choices"]) == 1 and "steps" not in answer.json()["choices"][0]["rcd"]
    assert len(set(map(repr, echo.requests))) == 1 and len(echo.requests) == 2 + len(optional(path))
    streamed = client.post(path, json=body | {"stream": True, "stream_options": {"include_usage": None}})
    assert streamed.text.endswith("data: [DONE]\n\n") and '"usage"' not in streamed.text


@pytest.mark.parametrize("path", BODIES)
def test_the_schema_allows_null(client: TestClient, path: str) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    properties = schemas[BODIES[path][0].__name__]["properties"]
    for name in optional(path):
        assert {"type": "null"} in properties[name]["anyOf"], name
    assert {"type": "null"} in schemas["StreamOptions"]["properties"]["include_usage"]["anyOf"]


def test_openai_client_sends_null(client: TestClient, echo: Echo) -> None:
    sent: list[dict[str, Any]] = []
    client.event_hooks = {"request": [lambda request: sent.append(json.loads(request.content))]}
    api: Any = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)
    nulls: dict[str, Any] = dict.fromkeys(
        ("n", "stream", "stream_options", "stop", "seed", "temperature", "top_p", "max_tokens")
    )
    assert api.completions.create(model="m", prompt="p", **nulls).choices[0].text == "<p>"
    api.chat.completions.create(model="m", messages=[{"role": "user", "content": "p"}], **nulls)
    assert all(body.items() >= nulls.items() for body in sent) and len(sent) == 2
    assert [r.settings for r in echo.requests] == [DEFAULTS] * 2


# -- errors


@pytest.mark.parametrize(
    ("change", "param", "hint"),
    [
        ({"confidence_treshold": 0.5}, "confidence_treshold", "'confidence_threshold'"),
        ({"temperature": -1.0}, "temperature", "-1.0"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"policy": "greedy"}, "policy", "'greedy'"),
        ({"n": 0}, "n", "0"),
        ({"max_tokens": 0}, "max_tokens", "0"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "max_completion_tokens"),
        ({"stop": ["a", ""]}, "stop", ""),
        ({"stream": 1}, "stream", "1"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"trace": True}, "trace", "return_trace"),
        ({"return_trace": "all"}, "return_trace", "'all'"),
        ({"timeout_s": 601.0}, "timeout_s", "600"),
        ({"timeout_s": 0}, "timeout_s", "0"),
        ({"model": None}, "model", ""),
        ({"prompt": []}, "prompt", ""),
        ({"prompt": None}, "prompt", ""),
        ({"prompt": [1, "a"]}, "prompt", ""),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt", "128"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"infill": True, "max_tokens": 5}, "max_tokens", "infill"),
        ({"infill": True, "stop_token_ids": [3]}, "stop_token_ids", "infill"),
        ({"stop_token_ids": [3] * 257}, "stop_token_ids", "256"),
        ({"prompt": "forbidden"}, "temperature", "this model refuses it"),
    ],
)
def test_an_invalid_field_is_named(client: TestClient, change: dict[str, Any], param: str, hint: str) -> None:
    response = complete(client, **change)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert hint in error["message"]


def test_other_errors_keep_the_shape(client: TestClient) -> None:
    unknown = complete(client, model="gpt")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
    assert unknown.json()["error"]["param"] == "model" and " m" in unknown.json()["error"]["message"]
    broken = complete(client, prompt="broken")
    assert broken.status_code == 500 and broken.json()["error"]["type"] == "server_error"
    for messages in ({}, {"messages": None}):
        missing = client.post("/v1/chat/completions", json={"model": "m", **messages})
        assert missing.status_code == 400 and missing.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("path", ["/docs", "/docs/oauth2-redirect", "/redoc", "/v1/nowhere"])
def test_unknown_paths_include_fastapi_docs(client: TestClient, path: str) -> None:
    """FastAPI's pages would load scripts from another host."""
    answer = client.get(path)
    error = {"message": f"GET {path}: Not Found", "type": "invalid_request_error", "param": None, "code": None}
    assert (answer.status_code, answer.json()) == (404, {"error": error})
