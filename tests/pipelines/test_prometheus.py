"""A real Prometheus on loopback scrapes a served application and a running job: the board's queries give numbers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve as ray_serve

from pipelines import serve
from pipelines.training.metrics import read_metrics
from tests.cluster.files import CLUSTER
from tests.pipelines.serving.serve_run import free_port, serve_context, until
from tests.pipelines.test_job import SUDOKU, Job

BOARD = json.loads((CLUSTER / "grafana" / "rcd.json").read_text())
ALERTS = CLUSTER / "grafana" / "alerts.yaml"
NAME = "scraped"  # an application of its own, because Ray keeps exporting the metrics of dead replicas
pytestmark = [
    pytest.mark.drill,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus"),
]


@contextmanager
def prometheus(directory: Path, targets: list[str]) -> Iterator[str]:
    """Its address. The limit is for a busy machine: a node of Ray has a megabyte of metrics."""
    config = {
        "global": {"scrape_interval": "20s", "scrape_timeout": "20s", "evaluation_interval": "5s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "rcd", "static_configs": [{"targets": targets}]}],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    files = [f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(["prometheus", *files, f"--web.listen-address={address}"], stdout=log, stderr=log)
        try:
            until(lambda: ready(f"http://{address}/-/ready"), seconds=60)
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def ready(url: str) -> bool:
    try:
        return bool(httpx.get(url, timeout=5, trust_env=False).is_success)
    except httpx.TransportError:
        return False


def query(address: str, expression: str) -> list[float]:
    answer = httpx.get(f"{address}/api/v1/query", params={"query": expression}, timeout=30, trust_env=False).json()
    assert answer["status"] == "success", (expression, answer)
    return [float(one["value"][1]) for one in answer["data"]["result"]]


def ask(url: str, number: int) -> None:
    body = {"model": "tiny-rcd", "prompt": [5, 6, 7, 8, number % 200 + 9] * 4, "stop_token_ids": [], "seed": number}
    httpx.post(f"{url}/v1/completions", json=body, timeout=120, trust_env=False).raise_for_status()


def test_queries_of_the_board_and_alerts_give_numbers(ray_cluster: str, tmp_path: Path) -> None:
    context = serve_context(tmp_path / "served", baseline=False)
    context = replace(context, recipe=context.recipe.model_copy(update={"name": NAME}))
    serve.run(context)
    url = serve.endpoint(context.recipe)
    job = Job("sudoku-reference", "watched", tmp_path, [*SUDOKU, "base.train.steps=100000", "base.train.log_every=1"])
    nodes = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes() if node["Alive"]]
    process = job.start("--stages", "prepare,base")
    try:
        with prometheus(tmp_path, [*nodes, url.removeprefix("http://")]) as address:
            until(lambda: training(job), seconds=600)
            last = job_metrics(address)
            assert last["ray_rcd_train_step"] > 0 and last["ray_rcd_stage_seconds"] > last["ray_rcd_stage_idle_seconds"]
            check_board(address, url)
            answer = httpx.get(f"{address}/api/v1/rules", timeout=30, trust_env=False).json()
            (rules,) = [group["rules"] for group in answer["data"]["groups"]]
            assert {rule["health"] for rule in rules} == {"ok"}
            assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
    finally:
        process.kill()
        process.wait()
        ray_serve.shutdown()


def training(job: Job) -> bool:
    try:
        return read_metrics(str(Path(job.run.path) / "base"))[-1]["step"] > 5
    except FileNotFoundError:
        return False


def job_metrics(address: str) -> dict[str, float]:
    wanted = ("ray_rcd_train_step", "ray_rcd_stage_seconds", "ray_rcd_stage_idle_seconds")
    expressions = {name: f'{name}{{run="watched",stage="base"}}' for name in wanted}
    until(lambda: all(query(address, expression) for expression in expressions.values()), seconds=240)
    return {name: query(address, expression)[0] for name, expression in expressions.items()}


def check_board(address: str, url: str) -> None:
    """Requests go on meanwhile, so that every rate has something to count."""
    # Nothing has failed or moved to another replica, so two counters of the ingress have no series. Blocks of single
    # requests are stored together with the next block's first pass, so the time of a store has nothing to divide by.
    without = re.compile(r"rcd_http_failed_streams_total|rcd_retries_total|rcd_store_passes_total")
    expressions = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    expressions = [e.replace("$Application", NAME).replace("$__rate_interval", "2m") for e in expressions]
    missing, deadline, number = list(expressions), time.monotonic() + 400, 0
    while missing and time.monotonic() < deadline:
        ask(url, number := number + 1)
        ask(url, number)  # the same prompt again: found in the cache
        missing = [e for e in missing if not any(value == value for value in query(address, e))]  # not NaN
        if all(without.search(e) for e in missing):
            break
    assert [e for e in missing if not without.search(e)] == []
    used: Any = query(address, f'sum(ray_rcd_requests_total{{application="{NAME}"}})')
    assert used and used[0] >= 2
