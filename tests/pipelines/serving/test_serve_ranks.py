"""A served model that is split over two processes, one of which is killed, on a real Ray.

`make drill` runs this.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve as ray_serve

from pipelines import serve
from pipelines.run.directory import StageContext
from tests.fault_table import FaultTable
from tests.pipelines.serving import http_clients as clients
from tests.pipelines.serving.http_clients import Reply, texts, words
from tests.pipelines.serving.serve_run import metrics, serve_context, until
from tests.pipelines.serving.test_serve_faults import SLOWER, TOKENS, alive

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]
GREEDY = {"policy": "low_confidence_dynamic", "temperature": 0.0}  # rounding could change what is drawn


@pytest.fixture(scope="module")
def deployed(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageContext]:
    context = serve_context(tmp_path_factory.mktemp("runs"), SLOWER, {"tensor_parallel": 2}, baseline=False)
    serve.run(context)
    yield context
    ray_serve.shutdown()


def other_ranks() -> list[Any]:
    """Actors of the ranks above 0."""
    actors = [a for a in ray.util.list_named_actors(all_namespaces=True) if a["name"].endswith("-rank-1")]
    return [ray.get_actor(a["name"], namespace=a["namespace"]) for a in actors]


def ask(context: StageContext, seed: int, stream: bool, started: threading.Semaphore | None = None) -> Reply:
    with httpx.Client(timeout=200, trust_env=False) as http:
        return clients.ask(http, serve.endpoint(context.recipe), words(seed, TOKENS, stream, **GREEDY), started)


def gone(actor: Any) -> bool:
    try:
        ray.get(actor.ready.remote(), timeout=5)
    except ray.exceptions.RayActorError:
        return True
    except ray.exceptions.GetTimeoutError:
        pass
    return False


@pytest.mark.faults("a rank of a split model killed", "deploy")
def test_a_lost_rank_ends_its_replica_and_serve_replaces_it(deployed: StageContext, fault_table: FaultTable) -> None:
    """While a request streams; it is resumed on the replica that replaces the lost one."""
    [expected] = texts(deployed, [1], TOKENS, **GREEDY).values()
    assert ask(deployed, 1, stream=False).text == expected
    [rank], before = other_ranks(), {a._actor_id for a in alive("Target")}
    started = threading.Semaphore(0)
    with ThreadPoolExecutor(1) as threads:
        stream = threads.submit(ask, deployed, 1, True, started)
        assert started.acquire(timeout=100)
        ray.kill(rank)
        killed = time.monotonic()
        until(lambda: {a._actor_id for a in alive("Target")}.isdisjoint(before), seconds=30)
        answer = stream.result(timeout=300)
    until(lambda: ask(deployed, 1, stream=False).text == expected, seconds=200)
    recovered = time.monotonic() - killed
    assert answer.text == expected or answer.status == 503 or answer.problem, answer
    [other] = other_ranks()
    assert other._actor_id != rank._actor_id
    fault_table.add("its replica ended and was replaced", "the same text", recovery_s=recovered)


def test_a_split_reference_answers_as_a_whole_one(deployed: StageContext, tmp_path: Path) -> None:
    [expected] = texts(deployed, [2], TOKENS, **GREEDY).values()
    port = deployed.recipe.deploy.port
    context = serve_context(tmp_path, SLOWER, baseline=False, port=port, reference_tensor_parallel=2)
    serve.run(context)
    until(lambda: len(other_ranks()) == 1 and len(alive("Target")) == 1, seconds=100)
    assert ask(context, 2, stream=False).text == expected
    found = metrics(context)
    assert found["reference_forwards_total"] > 0 == found["reference_failures_total"], found
