"""Unmodified clients against a real server with an API key: completions, chats, streams, a second turn.

The extra `clients` installs them; a test without its client is skipped. All but OpenAI's take long to import.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipelines.serving.served_app import BASELINE, PLAIN, Served, served

KEY = "s3cret"
SAY = {"role": "user", "content": "the fox"}


@pytest.fixture(scope="module")
def app() -> Iterator[Served]:
    with served(keys=(KEY,)) as app:
        yield app


@pytest.fixture(scope="module")
def first(app: Served) -> str:
    """The answer to a conversation of one turn."""
    return app.text(app.turns("the fox"), PLAIN, BASELINE)


@pytest.fixture(scope="module")
def second(app: Served, first: str) -> str:
    """The answer after that answer and the same turn again."""
    return app.text(app.turns("the fox", first, "the fox"), PLAIN, BASELINE)


@pytest.fixture(scope="module")
def continued(app: Served) -> str:
    """The completion of the plain text."""
    return app.text(app.ids("the fox"), PLAIN, BASELINE)


def client_of(name: str) -> Any:
    """A client's package, or a skipped test."""
    return pytest.importorskip(name, reason=f"{name} is not installed; the extra `clients` has it")


def test_openai(app: Served, first: str, second: str, continued: str) -> None:
    api: Any = client_of("openai").OpenAI(base_url=app.url + "/v1", api_key=KEY, max_retries=0)
    assert api.completions.create(model=BASELINE, prompt="the fox").choices[0].text == continued
    parts = api.completions.create(model=BASELINE, prompt="the fox", stream=True)
    assert "".join(choice.text for part in parts for choice in part.choices) == continued
    message = api.chat.completions.create(model=BASELINE, messages=[SAY]).choices[0].message
    assert message.content == first
    parts = api.chat.completions.create(model=BASELINE, messages=[SAY, message, SAY], stream=True)
    assert "".join(choice.delta.content or "" for part in parts for choice in part.choices) == second


@pytest.mark.drill
def test_litellm(app: Served, first: str, second: str, continued: str) -> None:
    litellm = client_of("litellm")
    server: dict[str, Any] = {"api_base": app.url + "/v1", "api_key": KEY, "max_retries": 0}
    plain = {"model": f"text-completion-openai/{BASELINE}", "prompt": "the fox", **server}
    answer = litellm.text_completion(**plain)
    assert answer.choices[0].text == continued
    parts = litellm.text_completion(**plain, stream=True)
    assert "".join(part.choices[0].text or "" for part in parts) == continued
    chat = {"model": f"openai/{BASELINE}", **server}
    message = litellm.completion(messages=[SAY], **chat).choices[0].message
    assert message.content == first
    for turn in (message, message.model_dump()):
        parts = litellm.completion(messages=[SAY, turn, SAY], stream=True, **chat)
        assert "".join(part.choices[0].delta.content or "" for part in parts) == second


@pytest.mark.drill
def test_langchain_openai(app: Served, first: str, second: str, continued: str) -> None:
    package = client_of("langchain_openai")
    server: dict[str, Any] = {"base_url": app.url + "/v1", "api_key": KEY, "max_retries": 0, "model": BASELINE}
    plain = package.OpenAI(**server, max_tokens=PLAIN.max_new_tokens, temperature=0)
    assert plain.invoke("the fox") == continued
    assert "".join(plain.stream("the fox")) == continued
    chat = package.ChatOpenAI(**server)
    answer = chat.invoke([("user", "the fox")])
    assert answer.content == first
    turns = [("user", "the fox"), answer, ("user", "the fox")]
    assert chat.invoke(turns).content == second
    assert "".join(part.content for part in chat.stream(turns)) == second
    assert answer.usage_metadata["output_tokens"] > 0
    with_logprobs = package.ChatOpenAI(**server).bind(logprobs=True, top_logprobs=2).invoke([("user", "the fox")])
    assert len(with_logprobs.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


@pytest.mark.drill
def test_llm(app: Served, first: str, second: str, continued: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    models = [
        {"model_id": "chat", "model_name": BASELINE, "api_base": app.url + "/v1", "api_key_name": "ours"},
        {"model_id": "plain", "model_name": BASELINE, "api_base": app.url + "/v1", "api_key_name": "ours"},
    ]
    models[1]["completion"] = True  # type: ignore[assignment]
    (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump(models))
    (tmp_path / "keys.json").write_text(json.dumps({"ours": KEY}))
    llm = client_of("llm")
    importlib.reload(importlib.import_module("llm.default_plugins.openai_models"))
    for stream in (True, False):
        conversation = llm.get_model("chat").conversation()
        assert conversation.prompt("the fox", stream=stream).text() == first
        assert conversation.prompt("the fox", stream=stream).text() == second
        options = {"max_tokens": PLAIN.max_new_tokens}
        assert llm.get_model("plain").prompt("the fox", stream=stream, **options).text() == continued


TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
GENERATE = """
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\0"], do_sample: false, max_gen_toks: 24}}
metric_list: [{{metric: exact_match}}]
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: [" a", " b"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


def lm_eval(app: Served, model: str, route: str, directory: Path, task: str, *more: str) -> Any:
    """Run the harness on one question, in a process of its own."""
    client_of("lm_eval")
    data = directory / "words.jsonl"
    data.write_text(json.dumps({"question": "the fox", "answer": "x"}))
    (directory / "words.yaml").write_text((TASK + task).format(data=data))
    app.tokenizer.save_pretrained(directory / "tokenizer")
    arguments = f"model={BASELINE},base_url={app.url}{route},max_retries=1,tokenizer={directory / 'tokenizer'}"
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments]
    command += ["--tasks", "words", "--include_path", str(directory), "--output_path", str(directory / "out")]
    env = {**os.environ, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(directory / "cache")}
    return subprocess.run([*command, "--log_samples", *more], env=env, capture_output=True, text=True, timeout=250)


@pytest.mark.drill
@pytest.mark.parametrize(
    ("model", "route", "more"),
    [
        ("local-completions", "/v1/completions", ()),
        ("local-chat-completions", "/v1/chat/completions", ("--apply_chat_template",)),
    ],
)
def test_lm_eval_generates(
    app: Served, first: str, continued: str, tmp_path: Path, model: str, route: str, more: tuple[str, ...]
) -> None:
    result = lm_eval(app, model, route, tmp_path, GENERATE, *more)
    assert result.returncode == 0, result.stderr
    [file] = (tmp_path / "out").rglob("samples_words_*.jsonl")
    assert json.loads(file.read_text())["resps"] == [[first if more else continued]]


@pytest.mark.drill
def test_lm_eval_is_told_that_log_likelihoods_do_not_exist(app: Served, tmp_path: Path) -> None:
    result = lm_eval(app, "local-completions", "/v1/completions", tmp_path, CHOOSE)
    assert result.returncode and "echo" in result.stderr and "generate_until" in result.stderr
