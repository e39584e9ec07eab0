"""The served application on a real Ray: tiny random models, deployed by the stage, asked by OpenAI's own client."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import serve as ray_serve
from rich.console import Console

from pipelines import serve
from pipelines.config import parse_recipe
from pipelines.keys import key_of
from pipelines.run import RunDirectory, StageContext
from rcd_core import Decoder, DecodeSettings, ModelConfig, load_model, new_model
from rcd_core.errors import UserError
from rcd_core.families.base import CheckpointInfo
from rcd_core.tokenizer import mask_token_id, stop_token_ids, train_tokenizer

BLOCK = 8
CANVAS = "12<|MASK|>4<|MASK|><|MASK|>78" * 2
SIZES = {"num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32, "max_positions": 128}
START = {"family": "sdar", "hidden_size": 16, "num_layers": 2, **SIZES}
SMALLER = {"family": "sdar", "hidden_size": 8, "num_layers": 1, **SIZES}


def save_model(directory: Path, sizes: dict[str, Any], seed: int, tokenizer: Any) -> None:
    info = CheckpointInfo(
        mask_token_id=mask_token_id(tokenizer),
        eos_token_ids=stop_token_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        block_length=BLOCK,
    )
    new_model(ModelConfig(**sizes), vocab_size=len(tokenizer), info=info, seed=seed).save_pretrained(
        directory, tokenizer
    )


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    """A run whose stages before deploy are done, the models random."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    storage = tmp_path_factory.mktemp("runs")
    raw = {
        "name": "tiny",
        "storage": str(storage),
        "block_length": BLOCK,
        "data": {"task": "sudoku", "train": "synthetic", "test": "synthetic", "num_train": 1, "num_test": 1},
        "reference": {"start": SMALLER, "train": {"steps": 1, "batch_size": 1}},
        "base": {"start": START, "train": {"steps": 1, "batch_size": 1}},
        "target": {"train": {"steps": 1, "batch_size": 1}},
        "signals": {"top_k": 16},
        "deploy": {"port": port, "model_id": "tiny-rcd", "baseline": True, "decode": {"max_new_tokens": 16}},
    }
    recipe = parse_recipe(raw)
    run = RunDirectory(recipe.run_directory)
    tokenizer = train_tokenizer(["digits 123456 and words"] * 4, 300)
    test = pa.table({"prompt": [CANVAS], "answer": ["12345678" * 2]})
    (Path(run.path) / "prepare" / "test").mkdir(parents=True)
    pq.write_table(test, Path(run.path) / "prepare" / "test" / "part-00000.parquet")
    for seed, (name, sizes) in enumerate({"target": START, "baseline": START, "reference": SMALLER}.items()):
        save_model(Path(run.stage_directory(name)) / "model", sizes, seed, tokenizer)
    for name in ("prepare", "target", "baseline", "reference"):
        run.finish(name, {"stage": name}, {"test": ["part-00000.parquet"]}, datetime.now().astimezone(), 0.0)
    return StageContext(
        recipe=recipe,
        run=run,
        stage="deploy",
        key="key-1",
        inputs=("prepare", "target", "reference", "baseline"),
        console=Console(file=io.StringIO(), width=60),
    )


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
    forwards = completion.model_extra["rcd"]["forwards"]
    assert forwards["denoise"] > 0 and forwards["reference"] > 0
    chat = client.chat.completions.create(model="tiny-rcd", messages=[{"role": "user", "content": "words"}])
    assert chat.choices[0].message.role == "assistant"
    assert chat.model_extra["rcd"]["settings"]["max_new_tokens"] == 16
    plain = client.completions.create(model="tiny-rcd-baseline", prompt="words")
    assert plain.model_extra["rcd"]["settings"]["residual"] is False
    assert plain.model_extra["rcd"]["forwards"]["reference"] == 0


def test_served_is_local(client: openai.OpenAI, deployed: StageContext) -> None:
    """Batched in the cluster with other requests, the reference in another process: what the engine gives alone."""
    model, reference = (load_model(deployed.checkpoint(name)) for name in ("target", "reference"))
    tokenizer = train_tokenizer(["digits 123456 and words"] * 4, 300)
    ids = tokenizer(CANVAS, add_special_tokens=False)["input_ids"]
    settings = DecodeSettings(residual=True, start="reference", temperature=0.8, residual_top_k=16)

    def ask(seed: int) -> Any:
        extra = {"infill": True, "residual_top_k": 16, "confidence_threshold": 0.85, "cache": "block"}
        return client.completions.create(model="tiny-rcd", prompt=CANVAS, temperature=0.8, seed=seed, extra_body=extra)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(1, 9)))
    for seed, answer in enumerate(answers, start=1):
        [alone] = Decoder(model, reference).infill([ids], replace(settings, seed=seed))
        assert answer.choices[0].text == tokenizer.decode(alone.canvas_ids)
        assert answer.model_extra["rcd"]["forwards"]["denoise"] == alone.num_forwards.denoise
        assert answer.choices[0].finish_reason == "stop"
        assert "MASK" not in answer.choices[0].text
    assert len({answer.choices[0].text for answer in answers}) > 1


def test_stop_strings_cut_the_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny-rcd", prompt="words", temperature=1.0, seed=3)
    text = whole.choices[0].text
    stop = text[2:4]
    cut = client.completions.create(model="tiny-rcd", prompt="words", temperature=1.0, seed=3, stop=[stop, "\0never"])
    assert cut.choices[0].text == text[: text.find(stop)]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": "a<|MASK|>b"}, "use infill"),
        ({"prompt": "no mask", "extra_body": {"infill": True}}, "no mask token"),
        ({"prompt": [100_000]}, "token id 100000"),
        ({"prompt": "a", "max_tokens": 4000}, "the model has 128"),
        ({"prompt": "a", "extra_body": {"cache": "dual"}}, "cache is 'dual'"),
        (
            {"prompt": "a", "model": "tiny-rcd-baseline", "extra_body": {"residual": True, "start": "reference"}},
            "start",
        ),
    ],
)
def test_what_the_model_refuses_is_a_400(client: openai.OpenAI, change: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny-rcd", **change})
    assert says in caught.value.body["message"]  # type: ignore[index, call-overload]


def test_the_default_length_gives_way_to_a_long_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny-rcd", prompt=[5] * 115)
    assert answer.usage is not None and answer.usage.completion_tokens <= 8


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


def test_the_same_key_is_left_alone_and_another_is_deployed(deployed: StageContext) -> None:
    def about() -> Any:
        return ray_serve.get_app_handle("tiny").version.remote().result(timeout_s=30)

    before = about()
    serve.run(deployed)
    assert about() == before and "is live already" in printed(deployed)
    serve.run(replace(deployed, key="key-2"))
    assert about()["key"] == "key-2"


def test_another_application_in_the_way_is_named(deployed: StageContext) -> None:
    other = deployed.recipe.model_copy(update={"name": "another"})
    with pytest.raises(UserError, match="already serves tiny .*--recipe tiny --teardown"):
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
        with pytest.raises(UserError, match=f"deploy.port {deployed.recipe.deploy.port} cannot be used"):
            serve.run(deployed)
