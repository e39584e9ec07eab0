"""Serve starts a second replica of target and reference under load and removes them afterwards, with correct answers
throughout. About three minutes; `make drill` runs it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ray import serve as ray_serve

from pipelines import serve
from pipelines.run.directory import StageContext
from pipelines.serving.description import Description, parse_description
from tests.pipelines.serving.http_clients import in_double_precision, keep_asking, texts
from tests.pipelines.serving.serve_run import metrics, serve_context, until
from tests.pipelines.serving.test_serve_faults import SLOWER

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]
CLIENTS, TOKENS = 12, 64
SEEDS = range(1, 9)
QUICK = {"upscale_delay_s": 1.0, "downscale_delay_s": 1.0}  # Serve's defaults are half a minute and ten minutes
REFERENCE_CALLS = 0.05  # on average; each takes milliseconds


@pytest.fixture(scope="module")
def deployed(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageContext]:
    replicas = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 3.0}
    context = serve_context(tmp_path_factory.mktemp("runs"), SLOWER, baseline=False, **replicas)
    describe = serve.describe

    def quick(*args: Any) -> Description:
        raw = describe(*args).model_dump(mode="json")
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
    """Replicas of target and reference by state."""
    deployments = ray_serve.status().applications["tiny"].deployments
    return [dict(deployments[name].replica_states) for name in ("Target", "Reference")]


def test_replicas_follow_the_load(deployed: StageContext) -> None:
    url, expected = serve.endpoint(deployed.recipe), texts(deployed, SEEDS, TOKENS)
    assert counts() == [{"RUNNING": 1}] * 2
    stop_load, stop_all = threading.Event(), threading.Event()

    started = time.monotonic()
    with ThreadPoolExecutor(CLIENTS + 1) as threads:
        clients = [threads.submit(keep_asking, url, n, SEEDS, TOKENS, stop_load) for n in range(CLIENTS)]
        clients.append(
            threads.submit(keep_asking, url, 0, SEEDS, TOKENS, stop_all, 2.0)
        )  # also while replicas are removed
        try:
            until(lambda: counts() == [{"RUNNING": 2}] * 2 and metrics(deployed)["replicas"] == 2, 200)
            print(f"\ntwo replicas of each after {time.monotonic() - started:.0f} s of {CLIENTS} clients")
            stop_load.set()
            quiet = time.monotonic()
            until(lambda: counts() == [{"RUNNING": 1}] * 2, 200)
            print(f"one of each again {time.monotonic() - quiet:.0f} s later")
        finally:
            stop_load.set()
            stop_all.set()
        replies = [reply for future in clients for reply in future.result(timeout=200)]
    assert [reply.problem for reply in replies if reply.problem] == []
    assert all(reply.text == expected[reply.body["seed"]] for reply in replies)
    assert all(reply.rcd["reference_failures"] == 0 for reply in replies)
    print(f"{len(replies)} answers, all correct")
