"""Serve's own commands with a Serve config, on a Ray head of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from pipelines.ray_cluster.local import Head, environment
from pipelines.serving.config_file import BUILD, CONFIG, read_config
from rcd_core.io import storage
from rcd_core.io.node_copy import CACHE
from tests.conftest import ROOT
from tests.pipelines.serving.serve_run import SMALLER, START, free_port, save_model, until
from tests.pipelines.serving.test_config_file import CONFIGURED, WARM
from tests.s3_server import s3_server


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
    application = {"name": "rcd", "route_prefix": "/", "import_path": BUILD, "args": args}
    http = {"host": "127.0.0.1", "port": free_port()}
    path.write_text(yaml.safe_dump({**CONFIGURED, "http_options": http, "applications": [application]}))
    return path


@pytest.fixture(scope="module")
def head(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    state = tmp_path_factory.mktemp("head") / "local.json"
    rcd = [sys.executable, "-m", "pipelines.cli.main"]
    env = {**environment(), CONFIG: str(config), CACHE: str(config.parent / "cache"), "PYTHONPATH": str(ROOT)}
    try:
        up = [*rcd, "up", "--state", str(state), "--dashboard-port", str(free_port())]
        subprocess.run(up, cwd=ROOT, env=env, check=True, timeout=120, stdout=subprocess.DEVNULL)
        head = Head.load(state)
        assert head is not None
        yield head
    finally:
        down = [*rcd, "down", "--state", str(state)]
        subprocess.run(down, cwd=ROOT, check=True, timeout=120, stdout=subprocess.DEVNULL)


def _serve(*words: str, head: Head | None = None) -> str:
    """Run Serve's own command, which is installed next to this Python."""
    command = [str(Path(sys.executable).parent / "serve"), *words, *(["--address", head.dashboard] if head else [])]
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _check_answers(config: Path, head: Head, name: str) -> None:
    """Wait until `serve status` says RUNNING, and query every model."""
    raw = yaml.safe_load(config.read_text())
    url = f"http://127.0.0.1:{raw['http_options']['port']}/v1"

    def running() -> bool:
        status = yaml.safe_load(_serve("status", head=head))
        states = {application: values["status"] for application, values in status["applications"].items()}
        assert states.get(name) != "DEPLOY_FAILED", states
        return states == {name: "RUNNING"}  # and the previous one is gone

    until(running, seconds=200)
    models = ["other", "rcd"]  # in the order of the file, whose keys are sorted

    def listed() -> bool:
        """The proxy learns of an application shortly after it runs."""
        answer = httpx.get(url + "/models", trust_env=False)
        return answer.status_code == 200 and [model["id"] for model in answer.json()["data"]] == models

    until(listed)
    for model, reference in zip(models, (False, True), strict=True):
        body = {"model": model, "prompt": "words"}
        answer = httpx.post(url + "/completions", json=body, timeout=60, trust_env=False).json()
        assert answer["usage"]["completion_tokens"] > 0, answer
        assert bool(answer["rcd"]["forwards"]["reference"]) == reference


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_serve_build_deploy_status_and_shutdown(
    config: Path, head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CONFIG, str(config))
    _serve("deploy", str(config), head=head)
    _check_answers(config, head, "rcd")
    copies = sorted(path.parent.name for path in config.parent.glob("cache/checkpoints/*/*/config.json"))
    assert copies == ["other", "reference", "target"], "one copy of each on this node"

    built = tmp_path / "built.yaml"
    _serve("build", "pipelines.serving.graph:app", "-o", str(built))
    raw = yaml.safe_load(built.read_text())
    names = [deployment["name"] for deployment in raw["applications"][0]["deployments"]]
    assert sorted(names) == ["Ingress", "Reference", "Target", "other"]
    raw |= {"http_options": yaml.safe_load(config.read_text())["http_options"], "proxy_location": "HeadOnly"}
    built.write_text(yaml.safe_dump(raw))
    assert read_config(str(built)) == raw
    _serve("deploy", str(built), head=head)
    _check_answers(built, head, "app1")

    _serve("shutdown", "-y", head=head)
    url = f"http://127.0.0.1:{raw['http_options']['port']}/v1/models"

    def gone() -> bool:
        try:
            return httpx.get(url, trust_env=False).status_code == 404
        except httpx.TransportError:
            return True

    until(gone)
