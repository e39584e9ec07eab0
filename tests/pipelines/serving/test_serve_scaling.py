"""Serve starts a second replica of the target and of the reference while much is asked, and removes it afterwards; no
answer suffers. About three minutes; `make drill` runs it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from ray import serve as ray_serve

from pipelines import serve
from pipelines.run.directory import StageContext
from pipelines.serving.description import Description, parse_description
from tests.pipelines.serving.http_clients import Reply, ask, in_double_precision, texts, words
from tests.pipelines.serving.serve_run import metrics, serve_context, until
from tests.pipelines.serving.test_serve_faults import SLOWER

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]
CLIENTS, TOKENS = 12, 64
SEEDS = range(1, 9)
QUICK = {"upscale_delay_s": 1.0, "downscale_delay_s": 1.0}  # Serve's own are half a minute and ten minutes
REFERENCE_CALLS = 0.05  # on average; each is over in milliseconds


@pytest.fixture(scope="module")
def deployed(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageContext]:
    replicas = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 3.0}
    context = serve_context(tmp_path_factory.mktemp("runs"), SLOWER, baseline=False, **replicas)
    described = serve.describe

    def quick(*given: Any) -> Description:
        raw = described(*given).model_dump(mode="json")
        for model in raw["models"].values():
            model["replicas"] |= QUICK
        raw["reference"]["replicas"] |= QUICK | {"target_ongoing_requests": REFERENCE_CALLS}
        return parse_description(raw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "describe", quick)
        serve.run(in_double_precision(context))
    yield context
    ray_serve.shutdown()


def counts() -> Any:
    """Replicas of the target and of the reference by their state."""
    deployments = ray_serve.status().applications["tiny"].deployments
    return [dict(deployments[name].replica_states) for name in ("Target", "Reference")]


def test_replicas_follow_the_load(deployed: StageContext) -> None:
    url, want = serve.endpoint(deployed.recipe), texts(deployed, SEEDS, TOKENS)
    assert counts() == [{"RUNNING": 1}] * 2
    much, some = threading.Event(), threading.Event()

    def keep_asking(number: int, over: threading.Event, pause_s: float) -> list[Reply]:
        found: list[Reply] = []
        with httpx.Client(timeout=200, trust_env=False) as http:
            while not over.wait(pause_s):
                i = number + len(found)
                found.append(ask(http, url, words(SEEDS[i % len(SEEDS)], TOKENS, stream=i % 2 == 0)))
        return found

    began = time.monotonic()
    with ThreadPoolExecutor(CLIENTS + 1) as threads:
        asking: list[Future[list[Reply]]] = [threads.submit(keep_asking, n, much, 0.0) for n in range(CLIENTS)]
        asking.append(threads.submit(keep_asking, 0, some, 2.0))  # goes on while replicas are taken away
        try:
            until(lambda: counts() == [{"RUNNING": 2}] * 2 and metrics(deployed)["replicas"] == 2, 200)
            print(f"\ntwo replicas of each after {time.monotonic() - began:.0f} s of {CLIENTS} clients")
            much.set()
            quiet = time.monotonic()
            until(lambda: counts() == [{"RUNNING": 1}] * 2, 200)
            print(f"one of each again {time.monotonic() - quiet:.0f} s later")
        finally:
            much.set()
            some.set()
        found = [reply for future in asking for reply in future.result(timeout=200)]
    assert [reply.problem for reply in found if reply.problem] == []
    assert all(reply.text == want[reply.body["seed"]] for reply in found)
    assert all(reply.rcd["reference_failures"] == 0 for reply in found)
    print(f"{len(found)} answers, all right")
