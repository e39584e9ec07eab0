"""The served application on a real Ray: tiny random models, deployed by the stage, queried with the OpenAI client."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from typing import Any

import httpx
import openai
import pytest
from httpx_sse import connect_sse
from ray import serve as ray_serve

from pipelines import serve
from pipelines.run.directory import StageContext
from pipelines.run.keys import key_of
from pipelines.serving.api_keys import api_keys
from pipelines.serving.http.guard import ApiLimits
from rcd_core import Decoder, DecodeSettings, ReferenceSignals, WarmStart, load_model
from rcd_core.errors import UserError
from tests.conftest import ROOT
from tests.pipelines.serving.serve_run import CANVAS, metrics, serve_context, tokenizer, until


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    return serve_context(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def deployed(ray_cluster: str, context: StageContext) -> Iterator[StageContext]:
    serve.run(context)
    yield context
    ray_serve.shutdown()


@pytest.fixture
def client(deployed: StageContext) -> openai.OpenAI:
    return openai.OpenAI(base_url=serve.endpoint(deployed.recipe) + "/v1", api_key="none", max_retries=0, timeout=60)


def printed(context: StageContext) -> str:
    assert isinstance(context.console.file, io.StringIO)
    return context.console.file.getvalue()


def test_the_client_lists_completes_and_chats(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list().data] == ["tiny-rcd", "tiny-rcd-baseline"]
    assert client.models.retrieve("tiny-rcd").owned_by == "rcd"
    completion = client.completions.create(model="tiny-rcd", prompt="words", max_tokens=10, seed=1)
    assert completion.choices[0].finish_reason in ("stop", "length")
    assert completion.usage is not None and completion.usage.completion_tokens <= 10
    rcd = completion.model_extra["rcd"]
    assert rcd["forwards"]["denoise"] > 0 and rcd["forwards"]["reference"] > 0
    assert rcd["tokens_per_pass"] < rcd["tokens_per_forward"], "the reference has said its size"
    chat = client.chat.completions.create(model="tiny-rcd", messages=[{"role": "user", "content": "words"}])
    assert chat.choices[0].message.role == "assistant"
    assert chat.model_extra["rcd"]["settings"]["max_new_tokens"] == 16
    traced = {"return_trace": "steps", "trace_candidates": 3}
    plain = client.completions.create(model="tiny-rcd-baseline", prompt="words", extra_body=traced)
    rcd = plain.model_extra["rcd"]
    assert rcd["settings"]["residual"] is False and rcd["forwards"]["reference"] == 0
    assert rcd["tokens_per_pass"] == rcd["tokens_per_forward"]
    step = plain.choices[0].model_extra["rcd"]["steps"][0]
    assert [len(top) for top in step["candidates"]] == [3] * len(step["masked"])


def test_served_equals_local(client: openai.OpenAI, deployed: StageContext) -> None:
    """Requests with different settings share a batch, and the reference runs in another process. Each answer is the
    library's own."""
    decoder = Decoder(*(load_model(deployed.checkpoint(name)) for name in ("target", "reference")))
    settings: list[dict[str, Any]] = [
        {"temperature": 0.8, "residual": True, "start": "reference", "residual_top_k": 16},  # of infills
        {"temperature": 0.7, "residual": True, "start": "reference", "residual_top_k": 16, "max_new_tokens": 40},
        {"temperature": 0.0, "residual": False, "start": "zero", "policy": "sequential", "max_new_tokens": 40},
        {"temperature": 1.2, "residual": True, "start": "zero", "block_length": 4, "denoising_steps": 2},
    ]

    def ask(number: int) -> Any:
        prompt, infill = ("words", False) if number % 4 else (CANVAS, True)
        body = {"infill": infill, "stop_token_ids": [], **settings[number % 4]}
        return client.completions.create(model="tiny-rcd", prompt=prompt, seed=number, extra_body=body)

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(ask, range(16)))
    for number, answer in enumerate(answers):
        local = DecodeSettings(**{"max_new_tokens": 16, **settings[number % 4]}, seed=number, stop_token_ids=())
        prompt, decode = ("words", decoder.generate) if number % 4 else (CANVAS, decoder.infill)
        [alone] = decode([tokenizer()(prompt, add_special_tokens=False)["input_ids"]], local)
        token_ids = alone.token_ids if number % 4 else alone.canvas_ids
        assert answer.choices[0].text == tokenizer().decode(token_ids, skip_special_tokens=bool(number % 4))
        assert answer.model_extra["rcd"]["forwards"]["denoise"] == alone.num_forwards.denoise
    filled = {answer.choices[0].text for answer in answers[::4]}
    assert len(filled) > 1 and not any("MASK" in text for text in filled)


def test_text_streams_block_by_block(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny-rcd", "prompt": "words", "max_tokens": 64, "seed": 5, "temperature": 1.0}
    whole = client.completions.create(**body)
    options = {"include_usage": True}
    chunks = list(client.completions.create(**body, stream=True, stream_options=options))  # type: ignore[call-overload]
    texts = [c.choices[0].text for c in chunks if c.choices and c.choices[0].text]
    assert len(texts) > 2 and "".join(texts) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].model_extra["rcd"]["forwards"]["denoise"] == whole.model_extra["rcd"]["forwards"]["denoise"]


def test_fifty_disconnects_free_their_slots(deployed: StageContext) -> None:
    """In the middle of answers of a thousand tokens, without changing the answers of the other clients."""
    url = serve.endpoint(deployed.recipe) + "/v1/completions"
    before = metrics(deployed)

    def leave(seed: int) -> bool:
        body = {"model": "tiny-rcd", "prompt": "words", "max_tokens": 1000, "seed": seed, "temperature": 1.0}
        body |= {"stream": True, "stop_token_ids": []}
        with httpx.Client(timeout=60, trust_env=False) as http, connect_sse(http, "POST", url, json=body) as source:
            return any(event.data for event in source.iter_sse())  # returns at the first event

    def stay(_: int) -> str:
        body = {"model": "tiny-rcd", "prompt": "words", "max_tokens": 64, "seed": 7, "temperature": 1.0}
        return str(httpx.post(url, json=body, timeout=60, trust_env=False).json()["choices"][0]["text"])

    alone = stay(0)
    with ThreadPoolExecutor(54) as threads:
        left, stayed = threads.map(leave, range(1, 51)), threads.map(stay, range(4))
        assert all(left) and list(stayed) == [alone] * 4

    def idle() -> bool:
        values = metrics(deployed)
        return values["running"] == values["queue_length"] == 0

    until(idle)
    after = metrics(deployed)
    assert after["cancelled_total"] - before["cancelled_total"] == 50
    assert after["requests_total"] - before["requests_total"] == 5, "a cancelled request was decoded to its end"


def test_stop_strings_cut_the_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny-rcd", prompt="words", temperature=1.0, seed=3)
    text = whole.choices[0].text
    stop = text[2:4]
    cut = client.completions.create(model="tiny-rcd", prompt="words", temperature=1.0, seed=3, stop=[stop, "\0never"])
    assert cut.choices[0].text == text[: text.find(stop)]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "param", "hint"),
    [
        ({"prompt": "a<|MASK|>b"}, None, "infill"),
        ({"prompt": "no mask", "extra_body": {"infill": True}}, None, "mask"),
        ({"prompt": [100_000]}, "prompt", "100000"),
        ({"prompt": "a", "max_tokens": 4000}, "max_tokens", "1023"),
        ({"prompt": "a", "extra_body": {"cache": "dual"}}, "cache", "'dual'"),
        (
            {"prompt": "a", "model": "tiny-rcd-baseline", "extra_body": {"residual": True, "start": "reference"}},
            "start",
            "",
        ),
    ],
)
def test_a_refusal_of_the_model_is_a_400(
    client: openai.OpenAI, change: dict[str, Any], param: str | None, hint: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny-rcd", **change})
    assert hint in caught.value.message and param in (None, caught.value.param)


def test_the_default_length_shrinks_for_a_long_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny-rcd", prompt=[5] * 1011)
    assert answer.usage is not None and answer.usage.completion_tokens <= 13  # of 1024 positions


def test_the_printed_command_works(deployed: StageContext) -> None:
    material = {"stage": "deploy"}
    summary = serve.run(deployed)
    assert summary == serve.run(deployed)
    deployed.run.finish("deploy", material, summary, datetime.now().astimezone(), 0.0)
    assert deployed.run.manifest("deploy")["key"] == key_of(material)  # type: ignore[index]
    serve.report(deployed)
    [line] = [line for line in printed(deployed).splitlines() if line.startswith("curl ")]
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    answer = json.loads(subprocess.run(shlex.split(line), capture_output=True, check=True, timeout=60).stdout)
    assert answer["choices"][0]["text"][0:2] == "12" and answer["model"] == "tiny-rcd"
    assert f"--recipe {deployed.run.path}/recipe.yaml --teardown" in printed(deployed).replace("\n", "")


def test_a_failed_call_to_the_reference_shifts_no_other_reply(deployed: StageContext) -> None:
    """Calls that arrive together share a pass. Every third one asks for a whole distribution, which is not sent."""
    handle = ray_serve.get_deployment_handle("Reference", "tiny")
    sizes = [None if n % 3 == 0 else n for n in range(12)]
    start = WarmStart(canvas_ids=tuple(range(8, 16)), positions=(2, 3), block_length=8)
    responses = [handle.signals.remote([replace(start, top_k=top_k)]) for top_k in sizes]
    for top_k, response in zip(sizes, responses, strict=True):
        if top_k is None:
            with pytest.raises(ValueError, match="top_k"):
                response.result(timeout_s=60)
        else:
            [reply] = response.result(timeout_s=60)
            assert ReferenceSignals.from_bytes(reply).topk_ids.shape[-1] == top_k


def test_the_snippet_of_the_readme_works(deployed: StageContext, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "pipelines" / "serving" / "README.md").read_text()
    [snippet] = re.findall(r"```python\n(from openai import OpenAI\n.*?)```", page, re.S)
    for theirs, ours in (("http://127.0.0.1:8000", serve.endpoint(deployed.recipe)), ('"rcd-demo"', '"tiny-rcd"')):
        assert theirs in snippet
        snippet = snippet.replace(theirs, ours)
    exec(snippet, {})
    filled = capsys.readouterr().out
    assert filled.startswith("#41") and "MASK" not in filled and len(filled) > len("#415")


def test_only_another_key_is_deployed_again(deployed: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    def about() -> Any:
        return ray_serve.get_app_handle("tiny").version.remote().result(timeout_s=30)

    before = about()
    serve.run(deployed)
    assert about() == before and "is live already" in printed(deployed)
    monkeypatch.setenv("RCD_API_KEYS", "sesame")
    limits_id = ApiLimits(api_keys=api_keys()).id
    live = {"replicas": None, "resources": None, "drain_s": None}
    assert serve._live("tiny") != ("key-1", limits_id, live), "without the new API key"
    serve.run(replace(deployed, key="key-2"))
    assert about()["key"] == "key-2" and "sesame" not in str(about())
    assert serve._live("tiny") == ("key-2", limits_id, live)
    base = serve.endpoint(deployed.recipe) + "/v1"
    assert openai.OpenAI(base_url=base, api_key="sesame", max_retries=0).models.retrieve("tiny-rcd").id == "tiny-rcd"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=base, api_key="open", max_retries=0).models.list()


def test_another_live_application_is_named(deployed: StageContext) -> None:
    other = deployed.recipe.model_copy(update={"name": "another"})
    with pytest.raises(UserError, match="--recipe tiny --teardown"):
        serve.run(replace(deployed, recipe=other))


def test_a_taken_port_is_named_and_teardown_frees_ours(deployed: StageContext) -> None:
    serve.teardown(deployed)
    assert "removed tiny" in printed(deployed)
    serve.teardown(deployed)
    assert "no application tiny" in printed(deployed)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: past connections do not count
        sock.bind(("127.0.0.1", deployed.recipe.deploy.port))
        sock.listen()
        with pytest.raises(UserError, match=f"deploy.port {deployed.recipe.deploy.port}"):
            serve.run(deployed)
