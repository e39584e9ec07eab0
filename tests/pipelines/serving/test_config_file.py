"""cluster/serve.yaml and its like: every mistake is named, and Serve's own command line deploys what is right."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from pipelines.cli import main as cli
from pipelines.ray_cluster.local import Head, environment
from pipelines.recipe.inputs import check_inputs
from pipelines.recipe.load import load_recipe
from pipelines.recipe.rules import reference_keys
from pipelines.serving.config_file import BUILD, CONFIG, config_problems, read_config
from pipelines.serving.description import (
    DescribedModel,
    DescribedReference,
    Description,
    Replicas,
    describe,
    parse_description,
)
from pipelines.serving.graph import build
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.io.node_copy import CACHE
from tests.conftest import ROOT
from tests.pipelines.serving.serve_run import SMALLER, START, free_port, save_model, serve_context, until
from tests.s3_server import s3_server

SHIPPED = ROOT / "cluster" / "serve.yaml"
WARM = {"residual": True, "start": "reference", "max_new_tokens": 16}
ARGS: dict[str, Any] = {
    "models": {
        "rcd": {"checkpoint": "/runs/target/model", "decode": WARM, "deployment": "Target"},
        "other": {"checkpoint": "s3://bucket/other"},
    },
    "reference": {"checkpoint": "owner/name", "top_k": 16},
}
CONFIGURED: dict[str, Any] = {
    "proxy_location": "HeadOnly",
    "http_options": {"host": "127.0.0.1", "port": 8000},
    "applications": [
        {
            "name": "rcd",
            "route_prefix": "/",
            "import_path": BUILD,
            "args": ARGS,
            "deployments": [{"name": "Target", "health_check_period_s": 5}, {"name": "Ingress"}],
        }
    ],
}
APPLICATION, OVERRIDE = ("applications", 0), ("applications", 0, "deployments", 0)
MODEL = (*APPLICATION, "args", "models", "rcd")


def changed(whole: dict[str, Any], place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    whole = copy.deepcopy(whole)
    inner: Any = whole
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    return whole


def test_the_shipped_file_and_this_one_have_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(config_problems(CONFIGURED)) == []
    assert cli.main(["serve", "check", str(SHIPPED)]) == 0
    assert capsys.readouterr().out == "rcd serves rcd, rcd-baseline\n"
    described = parse_description(read_config(str(SHIPPED))["applications"][0]["args"])
    assert described.deployments == ["Target", "Baseline", "Reference", "Ingress"]
    scaled = [described.models["rcd"].replicas, described.reference and described.reference.replicas]
    assert all(replicas and replicas.max_replicas > replicas.min_replicas for replicas in scaled)


def test_the_shipped_file_names_every_key() -> None:
    """It is the reference of the args: whatever key there is must be written there."""
    args = read_config(str(SHIPPED))["applications"][0]["args"]
    model, reference = args["models"]["rcd"], args["reference"]
    for kind, raw in ((Description, args), (DescribedModel, model), (DescribedReference, reference)):
        assert set(kind.model_fields) == set(raw)
    assert set(Replicas.model_fields) == set(model["replicas"])


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("proxy_locaton",), "HeadOnly", "proxy_locaton: unknown key; did you mean 'proxy_location'?"),
        (("http_options", "prt"), 1, "http_options.prt: unknown key; did you mean 'port'?"),
        (("http_options", "port"), "x", "http_options.port is 'x'; it should be a valid integer"),
        ((*APPLICATION, "max_ongoing"), 3, "applications.0.max_ongoing: unknown key"),
        ((*APPLICATION, "name"), None, "applications.0.name is null; it should be a valid string"),
        ((*OVERRIDE, "max_ongoing_request"), 1, "deployments.0.max_ongoing_request: unknown key; did you mean 'max_o"),
        ((*OVERRIDE, "name"), "Targt", "applications.0.deployments: there is no deployment 'Targt'; did you mean"),
        ((*OVERRIDE, "name"), "Ingress", "applications.0.deployments: 'Ingress' is given 2 times; keep one"),
        (
            (*OVERRIDE, "autoscaling_config"),
            {"min_replicas": 3, "max_replicas": 2},
            "applications.0.deployments.0.autoscaling_config.max_replicas (2) must be greater",
        ),
        (
            (*OVERRIDE, "autoscaling_config"),
            {"target_ongoing_request": 2},
            "deployments.0.autoscaling_config.target_ongoing_request: unknown key; did you mean 'target_ongoing_reque",
        ),
        ((*OVERRIDE, "ray_actor_options"), {"num_cpu": 1}, "deployments.0.ray_actor_options.num_cpu: unknown key"),
        ((*APPLICATION, "args"), {}, "applications.0.args.models is missing; add it"),
        ((*APPLICATION, "args", "modles"), {}, "applications.0.args.modles: unknown key; did you mean 'models'?"),
        ((*APPLICATION, "args", "reference", "topk"), 1, "args.reference.topk: unknown key; did you mean 'top_k'?"),
        ((*MODEL, "decode"), {"residul": True}, "models.rcd.decode.residul: unknown key; did you mean 'residual'?"),
        ((*MODEL, "decode"), {"policy": "best"}, "args.models.rcd.decode.policy is 'best'; "),
        ((*MODEL, "replicas"), {"min_replicas": 2}, "models.rcd.replicas.max_replicas is 1 but min_replicas is 2"),
        ((*MODEL, "checkpoint"), "runs/target/model", "models.rcd.checkpoint is 'runs/target/model', a relative path"),
        ((*MODEL, "deployment"), "other", "models.other.deployment, by default the id, is 'other', which is taken"),
        ((*MODEL, "deployment"), "a#b", "models.rcd.deployment, by default the id, is 'a#b', which is no name"),
        ((*APPLICATION, "args", "reference"), None, "models.rcd: its decode asks for the reference, but there is none"),
        ((*MODEL, "decode"), {}, "args.reference: no model uses it"),
    ],
)
def test_mistakes_are_named(place: tuple[str | int, ...], value: Any, says: str) -> None:
    found = list(config_problems(changed(CONFIGURED, place, value)))
    assert len(found) == 1 and says in found[0], found


def test_all_mistakes_come_in_one_message_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "serve.yaml"
    wrong = changed(changed(CONFIGURED, ("http_option",), {}), (*MODEL, "max_batch"), 0)
    text = yaml.safe_dump(changed(wrong, (*OVERRIDE, "num_replica"), 1))
    path.write_text(text + "target_capacity: 5e1\n")  # 50 in a recipe, "5e1" to Serve
    assert cli.main(["serve", "check", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: Serve config {path} has problems:" and len(lines) == 5
    for says in ("http_option: unknown", "num_replica: unknown", "max_batch is 0; it should be", "read as YAML 1.1"):
        assert any(says in line for line in lines), says
    path.write_text("- a list")
    assert cli.main(["serve", "check", str(path)]) == 2
    assert cli.main(["serve", "check", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.count("error: Serve config") == 2


def test_the_builder_refuses_with_the_same_words() -> None:
    wrong = changed({"args": ARGS}, ("args", "models", "rcd", "max_queu"), 1)["args"]
    with pytest.raises(UserError, match=r"args: models\.rcd\.max_queu: unknown key; did you mean 'max_queue'\?"):
        build(wrong)


def test_whether_a_model_has_the_reference_behind_it() -> None:
    cold = {"checkpoint": "/a", "decode": {"residual": True, "start": "zero"}}
    for start in ("zero", "self", "dirichlet"):
        alone = parse_description({"models": {"rcd": changed(cold, ("decode", "start"), start)}})
        assert alone.deployments == ["rcd", "Ingress"] and not alone.models["rcd"].uses_reference
    reference = {"checkpoint": "/b"}
    asked = parse_description({"models": {"rcd": {**cold, "reference": True}}, "reference": reference})
    assert asked.models["rcd"].uses_reference, "requests may ask for it though the default does not"
    with pytest.raises(UserError, match=r"models\.rcd: its reference is true, but there is none"):
        parse_description({"models": {"rcd": {**cold, "reference": True}}})


def test_a_recipe_describes_further_models(tmp_path: Path) -> None:
    """A checkpoint from anywhere beside target and baseline, with settings and deployment of its own."""
    other = {"checkpoint": str(tmp_path / "other"), "decode": {"residual": True, "start": "self"}}
    scaled = {"min_replicas": 2, "max_replicas": 3, "target_ongoing_requests": 7.0}
    context = serve_context(tmp_path, models={"other": other}, **scaled)
    described = describe(context.recipe, context.checkpoint)
    assert described.deployments == ["Target", "Baseline", "other", "Reference", "Ingress"]
    assert list(described.models) == ["tiny-rcd", "tiny-rcd-baseline", "other"]
    assert [model.uses_reference for model in described.models.values()] == [True, False, False]
    assert described.models["other"].decode.start == "self" and described.models["tiny-rcd"].decode.max_new_tokens == 16
    assert described.models["other"].replicas.target_ongoing_requests == 7.0
    assert described.reference is not None and described.reference.replicas.target_ongoing_requests is None
    assert described.bundles == [{"CPU": 0.5}] * 8
    assert parse_description(json.loads(described.model_dump_json())) == described, "what it describes is in order"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("deploy.models.x={checkpont: /a}", "deploy.models.x.checkpont: unknown key; did you mean 'checkpoint'?"),
        ("deploy.models.x={checkpoint: a/b/c}", "deploy.models.x.checkpoint is 'a/b/c', a relative path"),
        ("deploy.models.rcd-demo={checkpoint: /a}", "deploy.models.rcd-demo: the target has this name; choose"),
        ("deploy.models.Ingress={checkpoint: /a}", "deploy.models.Ingress: a deployment has this name; choose"),
        ("deploy.models={a/b: {checkpoint: /a}}", "deploy.models.a/b"),
    ],
)
def test_mistakes_in_a_recipe_s_models_are_named(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("demo", [override])
    assert says in str(caught.value)


def test_a_recipe_s_models_can_ask_for_the_reference_and_must_be_there(tmp_path: Path) -> None:
    warm = f"deploy.models.x={{checkpoint: {tmp_path}, decode: {{residual: true, start: reference}}}}"
    recipe = load_recipe("demo", [warm, "deploy.start=zero"])
    assert reference_keys(recipe)["deploy.models.x.decode"] == "deploy"
    with pytest.raises(UserError, match=r"deploy\.models\.x\.checkpoint: .* has no config\.json"):
        check_inputs(recipe)


# -- the real command line, on a Ray head of its own


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Serve config of tiny models in a bucket: target, reference and another."""
    directory = tmp_path_factory.mktemp("serve")
    for seed, (name, sizes) in enumerate({"target": START, "other": START, "reference": SMALLER}.items()):
        save_model(directory / name, sizes, seed)
    with s3_server("bucket"):
        for name in ("target", "other", "reference"):
            storage.upload_dir(directory / name, f"s3://bucket/{name}")
        yield _write_config(directory / "serve.yaml")


def _write_config(path: Path) -> Path:
    replicas = {"num_cpus": 0.1}
    models = {
        "rcd": {"checkpoint": "s3://bucket/target", "decode": WARM, "deployment": "Target", "replicas": replicas},
        "other": {"checkpoint": "s3://bucket/other", "decode": {"max_new_tokens": 8}, "replicas": replicas},
    }
    reference = {"checkpoint": "s3://bucket/reference", "top_k": 16, "replicas": replicas}
    args = {"models": models, "reference": reference}
    one = {"name": "rcd", "route_prefix": "/", "import_path": BUILD, "args": args}
    http = {"host": "127.0.0.1", "port": free_port()}
    path.write_text(yaml.safe_dump({**CONFIGURED, "http_options": http, "applications": [one]}))
    return path


@pytest.fixture(scope="module")
def head(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    state = tmp_path_factory.mktemp("head") / "local.json"
    rcd = [sys.executable, "-m", "pipelines.cli.main"]
    env = {**environment(), CONFIG: str(config), CACHE: str(config.parent / "cache"), "PYTHONPATH": str(ROOT)}
    try:
        up = [*rcd, "up", "--state", str(state), "--dashboard-port", str(free_port())]
        subprocess.run(up, cwd=ROOT, env=env, check=True, timeout=120, stdout=subprocess.DEVNULL)
        found = Head.load(state)
        assert found is not None
        yield found
    finally:
        down = [*rcd, "down", "--state", str(state)]
        subprocess.run(down, cwd=ROOT, check=True, timeout=120, stdout=subprocess.DEVNULL)


def _serve(*words: str, head: Head | None = None) -> str:
    """Serve's own command, as a user has it beside this Python."""
    program = Path(sys.executable).parent / "serve"
    at = ["--address", head.dashboard] if head else []
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(program), *words, *at], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _answers(config: Path, head: Head, name: str) -> None:
    """Waits until `serve status` says RUNNING, and asks every model."""
    raw = yaml.safe_load(config.read_text())
    url = f"http://127.0.0.1:{raw['http_options']['port']}/v1"

    def running() -> bool:
        status = yaml.safe_load(_serve("status", head=head))
        found = {application: one["status"] for application, one in status["applications"].items()}
        assert found.get(name) != "DEPLOY_FAILED", found
        return found == {name: "RUNNING"}  # and the one before is gone

    until(running, seconds=200)
    models = ["other", "rcd"]  # as the file has them, where keys are sorted

    def listed() -> bool:
        """The proxy hears of an application a moment after it runs."""
        answer = httpx.get(url + "/models", trust_env=False)
        return answer.status_code == 200 and [model["id"] for model in answer.json()["data"]] == models

    until(listed)
    for model, reference in zip(models, (False, True), strict=True):
        asked = {"model": model, "prompt": "words"}
        answer = httpx.post(url + "/completions", json=asked, timeout=60, trust_env=False).json()
        assert answer["usage"]["completion_tokens"] > 0, answer
        assert bool(answer["rcd"]["forwards"]["reference"]) == reference


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_serve_build_deploy_status_and_shutdown(
    config: Path, head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CONFIG, str(config))
    _serve("deploy", str(config), head=head)
    _answers(config, head, "rcd")
    copies = sorted(path.parent.name for path in config.parent.glob("cache/checkpoints/*/*/config.json"))
    assert copies == ["other", "reference", "target"], "each once on this node"

    built = tmp_path / "built.yaml"
    _serve("build", "pipelines.serving.graph:app", "-o", str(built))
    raw = yaml.safe_load(built.read_text())
    names = [one["name"] for one in raw["applications"][0]["deployments"]]
    assert sorted(names) == ["Ingress", "Reference", "Target", "other"]
    raw |= {"http_options": yaml.safe_load(config.read_text())["http_options"], "proxy_location": "HeadOnly"}
    built.write_text(yaml.safe_dump(raw))
    assert read_config(str(built)) == raw, "what Serve writes is in order"
    _serve("deploy", str(built), head=head)
    _answers(built, head, "app1")

    _serve("shutdown", "-y", head=head)
    url = f"http://127.0.0.1:{raw['http_options']['port']}/v1/models"

    def gone() -> bool:
        try:
            return httpx.get(url, trust_env=False).status_code == 404
        except httpx.TransportError:
            return True

    until(gone)
