"""Ray exports the same metrics as /metrics, and every query of the Grafana dashboard matches one."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from ray import serve as ray_serve
from ray.util import metrics as ray_metrics

from pipelines import serve
from pipelines.run.directory import StageContext
from pipelines.serving import engine_thread
from pipelines.serving.metrics import RayMetrics, description
from tests.pipelines.serving.serve_run import metrics, serve_context, until
from tests.pipelines.serving.test_engine_thread import OK, collect, request, thread

BOARD = json.loads((Path(__file__).parents[3] / "cluster" / "grafana" / "rcd.json").read_text())
NAME = "metered"  # an application of its own, because Ray keeps exporting the metrics of dead replicas
OF_THE_INGRESS = {"up", "retries_total", "replicas"}


@pytest.fixture(scope="module")
def context(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageContext]:
    """Has answered two requests with the same prompt, each with 16 tokens."""
    context = serve_context(tmp_path_factory.mktemp("runs"), baseline=False)
    context = replace(context, recipe=context.recipe.model_copy(update={"name": NAME}))
    serve.run(context)
    body = {"model": "tiny-rcd", "prompt": [5, 6, 7, 8, 9] * 4, "stop_token_ids": [], "seed": 1}
    for _ in range(2):
        url = serve.endpoint(context.recipe) + "/v1/completions"
        httpx.post(url, json=body, timeout=60, trust_env=False).raise_for_status()
    yield context
    ray_serve.shutdown()


def families(*urls: str) -> list[Metric]:
    pages = [httpx.get(url + "/metrics", timeout=30, trust_env=False).text for url in urls]
    return [family for page in pages for family in text_string_to_metric_families(page)]


def of_ray() -> list[Metric]:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return families(*(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes))


def values_of(deployment: str) -> dict[str, float]:
    """Ray's metrics of a deployment of the application, without `ray_rcd_`."""
    samples = [sample for family in of_ray() for sample in family.samples if sample.name.startswith("ray_rcd_")]
    ours = [s for s in samples if (s.labels["application"], s.labels["deployment"]) == (NAME, deployment)]
    assert len({s.labels["replica"] for s in ours}) <= 1
    return {s.name.removeprefix("ray_rcd_"): s.value for s in ours}


def test_ray_exports_what_metrics_shows(context: StageContext) -> None:
    expected = {name: value for name, value in metrics(context).items() if name not in OF_THE_INGRESS}
    until(lambda: values_of("Target") == pytest.approx(expected))
    assert expected["requests_total"] == expected["admitted_total"] == 2 and expected["tokens_total"] == 32
    assert expected["denoise_forwards_total"] > 0 and expected["denoise_seconds_total"] > 0
    assert (expected["reused_prefills_total"], expected["reused_tokens_total"]) == (1, 16)
    assert expected["failed_total"] == 0, "exported before the first one, or rate() would miss it"


def test_the_reference_counts_its_passes(context: StageContext) -> None:
    blocks = metrics(context)["reference_forwards_total"]
    assert blocks == 6
    # One request after the other: each block is a pass. Ray may export between two of them.
    until(lambda: values_of("Reference").get("reference_passes_total") == blocks)
    assert values_of("Reference")["reference_seconds_total"] > 0


def test_every_metric_has_a_description(context: StageContext) -> None:
    assert [name for name in metrics(context) if name != "up" and description(name) == description("anything")] == []


def names(expression: str) -> set[str]:
    """The metrics in a PromQL expression."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\bby\s*\([^)]*\)", " ", expression)
    return set(re.findall(r"\b[a-zA-Z_]\w*\b(?!\s*\()", bare))


def labels(expression: str) -> set[str]:
    matchers = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', expression)
    return {*matchers, *re.findall(r"\w+", " ".join(re.findall(r"\bby\s*\(([^)]*)\)", expression)))} - {"le"}


def test_every_query_of_the_dashboard_matches_a_metric(context: StageContext) -> None:
    variables = [v["query"]["query"] for v in BOARD["templating"]["list"] if v["type"] == "query"]
    queries = [re.fullmatch(r"label_values\((\w+), (\w+)\)", variable).groups() for variable in variables]  # type: ignore[union-attr]
    expressions = [f"sum by ({label}) ({name})" for name, label in queries]
    expressions += [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    exported: dict[str, set[str]] = {}

    def missing() -> set[str]:
        for family in [*of_ray(), *families(serve.endpoint(context.recipe))]:
            if family.type == "counter":  # some have no sample before their first event
                exported.setdefault(f"{family.name}_total", set())
            for sample in family.samples:
                exported.setdefault(sample.name, set()).update(sample.labels)
        return {name for expression in expressions for name in names(expression)} - exported.keys()

    until(lambda: not missing())
    for expression in expressions:
        assert names(expression)
        for name in names(expression):
            assert not exported[name] or labels(expression) <= exported[name], expression


def test_panels_do_not_overlap_and_use_the_selected_data_source() -> None:
    places = [panel["gridPos"] for panel in BOARD["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert {panel["datasource"]["uid"] for panel in BOARD["panels"]} == {"${datasource}"}
    assert BOARD["templating"]["list"][0]["name"] == "datasource"


def test_counters_are_exported_as_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[tuple[str, float]] = []

    def record(self: Any, value: float, tags: Any = None) -> None:
        records.append((self.info["name"], value))

    monkeypatch.setattr(ray_metrics.Metric, "_record", record)
    exporter = RayMetrics()
    for count, gauge in ((3.0, 1.0), (3.0, 0.0), (4.5, 0.0)):
        exporter.export({"tokens_total": count, "running": gauge})
    assert [value for name, value in records if name == "rcd_tokens_total"] == [0.0, 3.0, 1.5]
    assert [value for name, value in records if name == "rcd_running"] == [1.0, 0.0, 0.0], "again, or Ray drops it"


def test_queue_time_is_the_wait_for_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks once per pass: the second of two requests waits for all passes of the first."""
    passes, both_queued = 0, threading.Event()

    class Clock:
        def monotonic(self) -> float:
            return float(passes)

    monkeypatch.setattr(engine_thread, "time", Clock())

    async def run() -> None:
        with thread("sdar", max_batch=1) as engine:
            step = engine._engine.step

            def counted() -> Any:
                nonlocal passes
                assert both_queued.wait(20)
                done = step()
                passes += 1
                return done

            monkeypatch.setattr(engine._engine, "step", counted)
            both = [asyncio.create_task(collect(engine, request([5, 6, 7], replace(OK, seed=n)))) for n in range(2)]
            while len(engine._clients) < 2:
                await asyncio.sleep(0)
            both_queued.set()
            (_, first), _ = await asyncio.gather(*both)
            values = await engine.statistics()
            own = first.forwards["prefill"] + first.forwards["denoise"] + first.forwards["store"]
            assert own > 1 and (values["admitted_total"], values["queue_seconds_total"]) == (2, own)

    asyncio.run(run())
