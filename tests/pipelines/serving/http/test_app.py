"""The HTTP interface on a backend that echoes: what is accepted, what is refused, and the shape of every answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from pipelines.serving.http.bodies import DECODE_FIELDS, ChatRequest, CompletionRequest
from rcd_core.decode_settings import DecodeSettings
from tests.pipelines.serving.http.fake_backend import STEP, Echo, client_of

DEFAULTS = DecodeSettings(confidence_threshold=0.9, residual=True, start="reference")


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def client(echo: Echo) -> TestClient:
    return client_of(echo, DEFAULTS)


def complete(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/completions", json={"model": "m", "prompt": "p", **body})


def test_models_and_states(client: TestClient) -> None:
    card = {"id": "m", "object": "model", "created": 7, "owned_by": "rcd"}
    assert client.get("/v1/models").json() == {"object": "list", "data": [card]}
    assert client.get("/v1/models/m").json() == card
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    assert client.get("/version").json() == {"key": "k"}


def test_a_completion_has_openais_shape_and_the_passes(client: TestClient) -> None:
    body = complete(client, seed=5).json()
    assert body["id"].startswith("cmpl-") and body["object"] == "text_completion" and body["model"] == "m"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 8, "total_tokens": 11}
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"], choice["index"]) == ("<p>", "stop", 0)
    assert body["system_fingerprint"] == "k"
    assert body["rcd"]["forwards"] == {"prefill": 1, "denoise": 4, "store": 0, "reference": 1}
    assert body["rcd"]["tokens_per_forward"] == 2.0
    assert body["rcd"]["settings"]["confidence_threshold"] == 0.9 and body["rcd"]["settings"]["seed"] == 5
    assert body["rcd"]["reference_failures"] == 2 and body["rcd"]["seconds"] >= 0
    assert "steps" not in choice["rcd"]


def test_a_chat_has_openais_shape(client: TestClient, echo: Echo) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    body = client.post("/v1/chat/completions", json={"model": "m", "messages": messages}).json()
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert echo.asked[0].messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}]
    assert echo.asked[0].prompt is None


def test_settings_of_the_request_go_over_the_servers(client: TestClient, echo: Echo) -> None:
    response = complete(client, confidence_threshold=0.5, temperature=0.7, stop_token_ids=[3], max_tokens=9, seed=None)
    assert response.status_code == 200
    assert echo.asked[0].settings == replace(
        DEFAULTS, confidence_threshold=0.5, temperature=0.7, stop_token_ids=(3,), max_new_tokens=9
    )
    assert echo.asked[0].fixed_length
    complete(client)
    assert echo.asked[1].settings == DEFAULTS and not echo.asked[1].fixed_length


def test_every_setting_is_a_field_under_its_own_name() -> None:
    for model in (CompletionRequest, ChatRequest):
        assert set(DECODE_FIELDS) <= set(model.model_fields)


def test_choices_of_prompts_and_n(client: TestClient, echo: Echo) -> None:
    body = complete(client, prompt=["a", "b"], n=2, seed=10, return_trace="steps").json()
    assert [c["text"] for c in body["choices"]] == ["<a>", "<a>", "<b>", "<b>"]
    assert [c["rcd"]["seed"] for c in body["choices"]] == [10, 11, 10, 11]
    assert body["choices"][0]["rcd"]["steps"] == [STEP, STEP]
    assert body["usage"] == {"prompt_tokens": 6, "completion_tokens": 32, "total_tokens": 38}
    assert body["rcd"]["forwards"]["denoise"] == 16
    complete(client, prompt=[[1, 2], [3]])
    complete(client, prompt=[4, 5])
    assert [r.prompt for r in echo.asked[-3:]] == [[1, 2], [3], [4, 5]]


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"confidence_treshold": 0.5}, "confidence_treshold", "did you mean 'confidence_threshold'"),
        ({"tools": []}, "tools", "unknown field 'tools'"),
        ({"temperature": -1.0}, "temperature", "temperature is -1.0"),
        ({"temperature": "hot"}, "temperature", "temperature is 'hot'"),
        ({"policy": "greedy"}, "policy", "policy is 'greedy'"),
        ({"n": 0}, "n", "n is 0"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "give one"),
        ({"stop": ["a", ""]}, "stop", "empty string"),
        ({"stream": 1}, "stream", "stream is 1"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "goes with stream"),
        ({"trace": True}, "trace", "over HTTP it is return_trace"),
        ({"return_trace": "all"}, "return_trace", "return_trace is 'all'"),
        ({"timeout_s": 601.0}, "timeout_s", "at most 600"),
        ({"timeout_s": 0}, "timeout_s", "timeout_s is 0"),
        ({"prompt": []}, "prompt", "it must be a text, texts"),
        ({"prompt": None}, "prompt", "prompt"),
        ({"prompt": [1, "a"]}, "prompt", "it must be a text, texts"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt", "at most 128 in all"),
        ({"stop": ["x"] * 17}, "stop", "at most 16 texts"),
        ({"infill": True, "max_tokens": 5}, "max_tokens", "infill"),
        ({"prompt": "forbidden"}, "temperature", "this model refuses it"),
    ],
)
def test_a_bad_field_is_named(client: TestClient, change: dict[str, Any], param: str, says: str) -> None:
    response = complete(client, **change)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert says in error["message"]


def test_other_errors_keep_the_shape(client: TestClient) -> None:
    unknown = complete(client, model="gpt")
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
    assert "served here: m" in unknown.json()["error"]["message"]
    broken = complete(client, prompt="broken")
    assert broken.status_code == 500 and broken.json()["error"]["type"] == "server_error"
    no_json = client.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert no_json.status_code == 400 and "no valid JSON" in no_json.json()["error"]["message"]
    nowhere = client.get("/v1/nowhere")
    assert nowhere.status_code == 404 and "/v1/nowhere" in nowhere.json()["error"]["message"]
    missing = client.post("/v1/chat/completions", json={"model": "m"})
    assert missing.status_code == 400 and missing.json()["error"]["param"] == "messages"
