"""Serve config files: every mistake is named by its key."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cli import main as cli
from pipelines.recipe.inputs import check_inputs
from pipelines.recipe.load import load_recipe
from pipelines.recipe.rules import reference_keys
from pipelines.serving import graph
from pipelines.serving.config_file import BUILD, config_problems, read_config
from pipelines.serving.description import (
    DescribedModel,
    DescribedReference,
    Description,
    Replicas,
    describe,
    parse_description,
)
from pipelines.serving.graph import build
from pipelines.serving.http.guard import ApiLimits
from rcd_core.errors import UserError
from tests.conftest import ROOT
from tests.pipelines.serving.serve_run import serve_context

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


def changed(config: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    inner: Any = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return config


def test_code_that_does_not_exist_is_named() -> None:
    def problems(path: str, **more: Any) -> list[str]:
        application = {"name": "x", "import_path": path, **more}
        return list(config_problems({"applications": [application]}))

    for path in ("pipelines.nothing:app", "no_such_package.module:app", "pipelines.serving.graph:bild"):
        (line,) = problems(path)
        assert line.startswith("applications.0.import_path: ") and path in line
    assert "'pipelines.serving.graph:build'" in problems("pipelines.serving.graph:bild")[0]
    assert problems("json.tool:app") == []
    assert problems("theirs.app:app", runtime_env={"working_dir": "s3://bucket/code.zip"}) == []


def test_the_shipped_file_has_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(config_problems(CONFIGURED)) == []
    assert cli.main(["serve", "check", str(SHIPPED)]) == 0
    assert capsys.readouterr().out == "rcd serves rcd, rcd-baseline\n"
    description = parse_description(read_config(str(SHIPPED))["applications"][0]["args"])
    assert description.deployments == ["Target", "Baseline", "Reference", "Ingress"]
    scaled = [description.models["rcd"].replicas, description.reference and description.reference.replicas]
    assert all(replicas and replicas.max_replicas > replicas.min_replicas for replicas in scaled)


def test_the_shipped_file_has_every_key() -> None:
    """It is the reference of the args."""
    args = read_config(str(SHIPPED))["applications"][0]["args"]
    model, reference = args["models"]["rcd"], args["reference"]
    for kind, raw in ((Description, args), (DescribedModel, model), (DescribedReference, reference)):
        assert set(kind.model_fields) == set(raw)
    assert set(Replicas.model_fields) == set(model["replicas"])


@pytest.mark.parametrize(
    ("path", "value", "key", "hint"),
    [
        (("proxy_locaton",), "HeadOnly", "proxy_locaton", "'proxy_location'"),
        (("http_options", "prt"), 1, "http_options.prt", "'port'"),
        (("http_options", "port"), "x", "http_options.port", "'x'"),
        ((*APPLICATION, "max_ongoing"), 3, "applications.0.max_ongoing", ""),
        ((*APPLICATION, "name"), None, "applications.0.name", "null"),
        ((*OVERRIDE, "max_ongoing_request"), 1, "deployments.0.max_ongoing_request", "'max_ongoing_requests'"),
        ((*OVERRIDE, "name"), "Targt", "applications.0.deployments", "'Target'"),
        ((*OVERRIDE, "name"), "Ingress", "applications.0.deployments", "'Ingress'"),
        (
            (*OVERRIDE, "autoscaling_config"),
            {"min_replicas": 3, "max_replicas": 2},
            "deployments.0.autoscaling_config.max_replicas",
            "2",
        ),
        (
            (*OVERRIDE, "autoscaling_config"),
            {"target_ongoing_request": 2},
            "deployments.0.autoscaling_config.target_ongoing_request",
            "'target_ongoing_requests'",
        ),
        ((*OVERRIDE, "ray_actor_options"), {"num_cpu": 1}, "deployments.0.ray_actor_options.num_cpu", ""),
        ((*APPLICATION, "args"), {}, "applications.0.args.models", ""),
        ((*APPLICATION, "args", "modles"), {}, "applications.0.args.modles", "'models'"),
        ((*APPLICATION, "args", "reference", "topk"), 1, "args.reference.topk", "'top_k'"),
        ((*MODEL, "decode"), {"residul": True}, "models.rcd.decode.residul", "'residual'"),
        ((*MODEL, "decode"), {"policy": "best"}, "args.models.rcd.decode.policy", "'best'"),
        ((*MODEL, "replicas"), {"min_replicas": 2}, "models.rcd.replicas.max_replicas", "min_replicas is 2"),
        ((*MODEL, "checkpoint"), "runs/target/model", "models.rcd.checkpoint", "'runs/target/model'"),
        ((*MODEL, "deployment"), "other", "models.other.deployment", "'other'"),
        ((*MODEL, "deployment"), "a#b", "models.rcd.deployment", "'a#b'"),
        ((*APPLICATION, "args", "reference"), None, "models.rcd", "decode"),
        ((*MODEL, "decode"), {}, "args.reference", ""),
    ],
)
def test_a_mistake_is_named_by_its_key(path: tuple[str | int, ...], value: Any, key: str, hint: str) -> None:
    [problem] = config_problems(changed(CONFIGURED, path, value))
    assert re.match(rf"[\w.]*{re.escape(key)}\b", problem) and hint in problem, problem


def test_one_message_lists_all_mistakes_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "serve.yaml"
    wrong = changed(changed(CONFIGURED, ("http_option",), {}), (*MODEL, "max_batch"), 0)
    text = yaml.safe_dump(changed(wrong, (*OVERRIDE, "num_replica"), 1))
    path.write_text(text + "target_capacity: 5e1\n")  # 50 in a recipe, "5e1" to Serve
    assert cli.main(["serve", "check", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: Serve config {path} has problems:" and len(lines) == 5
    for key in ("http_option:", "num_replica:", "max_batch is 0", "YAML 1.1"):
        assert any(key in line for line in lines), key
    path.write_text("- a list")
    assert cli.main(["serve", "check", str(path)]) == 2
    assert cli.main(["serve", "check", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.count("error: Serve config") == 2


def test_a_host_beyond_this_machine_needs_keys_or_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RCD_API_KEYS", raising=False)
    path = tmp_path / "serve.yaml"
    opened = changed(CONFIGURED, ("http_options", "host"), "0.0.0.0")
    without = {name: value for name, value in CONFIGURED.items() if name != "http_options"}  # Serve's default
    for config in (opened, without):
        path.write_text(yaml.safe_dump(config))
        assert cli.main(["serve", "check", str(path)]) == 2
        assert "http_options.host" in (error := capsys.readouterr().err) and "RCD_API_KEYS" in error
    path.write_text(yaml.safe_dump(changed(opened, (*APPLICATION, "args", "allow_without_keys"), True)))
    assert cli.main(["serve", "check", str(path)]) == 0
    path.write_text(yaml.safe_dump(opened))
    monkeypatch.setenv("RCD_API_KEYS", "a")
    assert cli.main(["serve", "check", str(path)]) == 0


@pytest.mark.parametrize(("host", "starts"), [("127.0.0.1", True), ("0.0.0.0", False), ("10.0.0.1", False)])
def test_the_ingress_starts_beyond_this_machine_with_keys_or_permission_only(
    host: str, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the application was built: it asks Serve for its address."""
    monkeypatch.setattr(graph, "http_host", lambda: host)

    def start(limits: ApiLimits) -> None:
        graph.Ingress.__mro__[1]({}, {}, {"created": 1}, limits)  # without Serve's wrapper, which needs a replica

    start(ApiLimits(api_keys=("a",)))
    start(ApiLimits(allow_without_keys=True))
    if starts:
        start(ApiLimits())
    else:
        with pytest.raises(UserError, match=r"http_options\.host .*RCD_API_KEYS"):
            start(ApiLimits())


def test_the_args_say_who_gets_in_and_where_the_ingress_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCD_API_KEYS", "a")
    monkeypatch.setattr(graph, "_num_nodes", lambda: 3)
    models = {"models": {"rcd": {"checkpoint": "/a"}}}

    def ingress(**args: Any) -> Any:
        return build({**models, **args})._bound_deployment

    default = ingress()
    assert default.init_args[3] == ApiLimits(api_keys=("a",))
    assert default.num_replicas == 2 and default.ray_actor_options["resources"] == graph.ON_HEAD
    assert default._deployment_config.graceful_shutdown_timeout_s == ApiLimits().timeout_s + graph.DRAIN_SPARE_S
    doors: dict[str, Any] = {"allow_without_keys": True, "open_state": True, "cors_origins": ("https://a.b",)}
    assert ingress(**doors).init_args[3] == ApiLimits(api_keys=("a",), **doors)
    placed = ingress(ingress={"replicas": 5, "resources": {}, "drain_s": 7})
    assert placed.num_replicas == 5 and not placed.ray_actor_options.get("resources")
    assert placed._deployment_config.graceful_shutdown_timeout_s == 7
    monkeypatch.setattr(graph, "_num_nodes", lambda: 1)
    assert ingress().num_replicas == 1


def test_a_recipe_says_it_too() -> None:
    keys = ["deploy.allow_without_keys=true", "deploy.open_state=true", "deploy.ingress={replicas: 4, drain_s: 9}"]
    keys.append("deploy.cors_origins=['https://a.b:8']")
    description = describe(load_recipe("sudoku-reference", keys), "/{}".format)
    assert description.allow_without_keys and description.open_state and description.cors_origins == ("https://a.b:8",)
    with pytest.raises(UserError, match=r"deploy\.cors_origins"):
        load_recipe("sudoku-reference", ["deploy.cors_origins=[a.b]"])
    assert (description.ingress.replicas, description.ingress.drain_s) == (4, 9)


def test_the_builder_names_the_same_key() -> None:
    wrong = changed({"args": ARGS}, ("args", "models", "rcd", "max_queu"), 1)["args"]
    with pytest.raises(UserError, match=r"args: models\.rcd\.max_queu: .*'max_queue'"):
        build(wrong)


def test_which_models_use_the_reference() -> None:
    cold = {"checkpoint": "/a", "decode": {"residual": True, "start": "zero"}}
    for start in ("zero", "self", "dirichlet"):
        alone = parse_description({"models": {"rcd": changed(cold, ("decode", "start"), start)}})
        assert alone.deployments == ["rcd", "Ingress"] and not alone.models["rcd"].uses_reference
    reference = {"checkpoint": "/b"}
    optional = parse_description({"models": {"rcd": {**cold, "reference": True}}, "reference": reference})
    assert optional.models["rcd"].uses_reference, "requests may start from it though the default does not"
    with pytest.raises(UserError, match=r"models\.rcd: .*reference is true"):
        parse_description({"models": {"rcd": {**cold, "reference": True}}})


def test_every_rank_of_a_replica_has_resources_and_a_gpu_of_its_own() -> None:
    replicas = {"min_replicas": 2, "max_replicas": 2, "num_gpus": 1}
    model = {"checkpoint": "/a", "tensor_parallel": 2, "replicas": replicas}
    assert parse_description({"models": {"rcd": model}}).bundles == [{"CPU": 0.5, "GPU": 1.0}] * 4
    with pytest.raises(UserError, match=r"models\.rcd\.replicas\.num_gpus is 0\.5 and tensor_parallel 2"):
        parse_description({"models": {"rcd": changed(model, ("replicas", "num_gpus"), 0.5)}})
    reference = {"checkpoint": "/b", "tensor_parallel": 4, "replicas": {"num_gpus": 1}}
    both = {"models": {"rcd": {**model, "reference": True}}, "reference": reference}
    assert parse_description(both).bundles == [{"CPU": 0.5, "GPU": 1.0}] * 8
    with pytest.raises(UserError, match=r"reference\.replicas\.num_gpus is 0\.5 and tensor_parallel 4"):
        parse_description(changed(both, ("reference", "replicas", "num_gpus"), 0.5))


def test_a_recipe_can_serve_other_checkpoints(tmp_path: Path) -> None:
    """Next to target and baseline, with their own settings and deployment."""
    other = {"checkpoint": str(tmp_path / "other"), "decode": {"residual": True, "start": "self"}}
    scaled = {"min_replicas": 2, "max_replicas": 3, "target_ongoing_requests": 7.0}
    context = serve_context(tmp_path, models={"other": other}, **scaled)
    description = describe(context.recipe, context.checkpoint)
    models = description.models
    assert description.deployments == ["Target", "Baseline", "other", "Reference", "Ingress"]
    assert list(models) == ["tiny-rcd", "tiny-rcd-baseline", "other"]
    assert [model.uses_reference for model in models.values()] == [True, False, False]
    assert models["other"].decode.start == "self" and models["tiny-rcd"].decode.max_new_tokens == 16
    assert models["other"].replicas.target_ongoing_requests == 7.0
    assert description.reference is not None and description.reference.replicas.target_ongoing_requests is None
    assert description.bundles == [{"CPU": 0.5}] * 8
    assert parse_description(json.loads(description.model_dump_json())) == description


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("deploy.models.x={checkpont: /a}", "deploy.models.x.checkpont:"),
        ("deploy.models.x={checkpoint: a/b/c}", "deploy.models.x.checkpoint is 'a/b/c'"),
        ("deploy.models.rcd-demo={checkpoint: /a}", "deploy.models.rcd-demo:"),
        ("deploy.models.Ingress={checkpoint: /a}", "deploy.models.Ingress:"),
        ("deploy.models={a/b: {checkpoint: /a}}", "deploy.models: the name is 'a/b'"),
    ],
)
def test_a_mistake_in_a_recipe_s_models_is_named(override: str, key: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("sudoku-reference", [override])
    assert key in str(caught.value)


def test_a_recipe_s_models_can_use_the_reference_and_must_exist(tmp_path: Path) -> None:
    warm = f"deploy.models.x={{checkpoint: {tmp_path}, decode: {{residual: true, start: reference}}}}"
    recipe = load_recipe("sudoku-reference", [warm, "deploy.start=zero"])
    assert reference_keys(recipe)["deploy.models.x.decode"] == "deploy"
    with pytest.raises(UserError, match=r"deploy\.models\.x\.checkpoint: "):
        check_inputs(recipe)
