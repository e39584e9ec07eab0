"""Fields that this server lacks: accepted where they ask for nothing, refused by name where they ask for something."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from pipelines.serving.http import neutral
from pipelines.serving.http.bodies import CompletionRequest
from tests.pipelines.serving.http.fake_backend import DEFAULTS, Echo

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "m", "prompt": "p"},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "p"}]},
}
NEUTRAL: dict[str, list[Any]] = {
    "frequency_penalty": [0, 0.0, None],
    "presence_penalty": [0, 0.0, None],
    "repetition_penalty": [1, 1.0, None],
    "logit_bias": [{}, None],
    "logprobs": [False, None],
    "top_logprobs": [0, None],
    "tools": [[], None],
    "tool_choice": ["none", "auto", None],
    "parallel_tool_calls": [True, False, None],
    "functions": [[], None],
    "function_call": ["none", None],
    "response_format": [{"type": "text"}, None],
    "metadata": [{}, {"run": "1"}, None],
    "store": [False, None],
    "service_tier": ["auto", "default", None],
    "best_of": [1, None],
    "echo": [False, None],
    "suffix": ["", None],
    "modalities": [["text"], None],
    "top_k": [-1, 0, None],
    "min_p": [0, 0.0, None],
    "ignore_eos": [False, None],
    "use_beam_search": [False, None],
    "stream_options": [{}, {"include_usage": False}, {"include_obfuscation": False}, None],
    "user": ["someone"],
    "safety_identifier": ["someone"],
}
ASKING: dict[str, list[Any]] = {
    "frequency_penalty": [0.5, -1, False, "0"],
    "presence_penalty": [0.5, 1e-9],
    "repetition_penalty": [1.1, True],
    "logit_bias": [{"5": -100}],
    "logprobs": [-1, 21, "1"],
    "top_logprobs": [3, -1],
    "tools": [[{"type": "function", "function": {"name": "f"}}]],
    "tool_choice": ["required", {"type": "function"}],
    "functions": [[{"name": "f"}]],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, {"type": "text", "x": 1}],
    "store": [True],
    "service_tier": ["flex"],
    "best_of": [2],
    "echo": [True],
    "suffix": ["end"],
    "modalities": [["text", "audio"]],
    "audio": [{"voice": "alloy"}],
    "top_k": [-2],
    "min_p": [0.1],
    "min_tokens": [4],
    "ignore_eos": [True],
    "guided_json": [{}],
    "stream_options": [{"include_usage": True}],
}


def cases(values: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, listed in values.items() for value in listed]


@pytest.mark.parametrize("path", BODIES)
def test_a_value_that_asks_for_nothing_changes_nothing(client: TestClient, echo: Echo, path: str) -> None:
    listed = [(name, value) for name, values in neutral.BODY.items() for value in (*values, None)]
    for name, value in [*cases(NEUTRAL), *listed]:
        answer = client.post(path, json=BODIES[path] | {name: value})
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["choices"]) == 1
    assert {repr(request.settings) for request in echo.requests} == {repr(DEFAULTS)}


@pytest.mark.parametrize("path", BODIES)
def test_a_value_that_asks_for_something_is_refused_by_name(client: TestClient, echo: Echo, path: str) -> None:
    for name, value in cases(ASKING):
        answer = client.post(path, json=BODIES[path] | {name: value})
        assert answer.status_code == 400, (name, value)
        assert answer.json()["error"]["param"] == name and name in answer.json()["error"]["message"]
    assert not echo.requests


def test_best_of_may_equal_n(client: TestClient) -> None:
    assert client.post("/v1/completions", json=BODIES["/v1/completions"] | {"n": 3, "best_of": 3}).status_code == 200


def test_a_message_may_have_neutral_fields(client: TestClient, echo: Echo) -> None:
    """As clients send the assistant's turn of an earlier answer."""
    neutral_fields = {name: None for name in neutral.MESSAGE}
    messages = [
        {"role": "developer", "content": "be brief", "name": "us"},
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": None}], "type": "text"},
        {"role": "assistant", "content": "b", **neutral_fields, "reasoning_content": None},
        {"role": "assistant", "content": "c", "tool_calls": [], "annotations": [], "refusal": None},
        {"role": "user", "content": "d", "name": None},
    ]
    answer = client.post("/v1/chat/completions", json={"model": "m", "messages": messages})
    assert answer.status_code == 200, answer.text
    roles = ("system", "user", "assistant", "assistant", "user")
    sent = [{"role": role, "content": text} for role, text in zip(roles, ["be brief", *"abcd"], strict=True)]
    assert echo.requests[0].messages == sent


def test_openai_clients_send_an_answer_back(client: TestClient, echo: Echo) -> None:
    api: Any = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client, max_retries=0)
    first = {"role": "user", "content": "p"}
    message = api.chat.completions.create(model="m", messages=[first]).choices[0].message
    for turn in (message, message.model_dump()):
        api.chat.completions.create(model="m", messages=[first, turn, first])
        assert echo.requests[-1].messages == [first, {"role": "assistant", "content": message.content}, first]


def test_all_tokens_may_be_sampled_where_the_server_has_a_top_k() -> None:
    request = CompletionRequest(model="m", prompt="p", top_k=-1)
    assert request.settings(replace(DEFAULTS, top_k=5)).top_k is None
