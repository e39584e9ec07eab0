"""Replicas killed under load, on a real Ray with two of each kind: no request fails and no text changes.

Replicas start slowly, so `make drill` runs these.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from tests.pipelines.serving.serve_run import BLOCK, metrics, serve_context, until
from tests.pipelines.serving.test_metrics import of_ray

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]
SLOWER = {"hidden_size": 128, "num_layers": 4, "intermediate_size": 256}  # so that answers take seconds
TOKENS = 400
POLICY = "low_confidence_dynamic"


@pytest.fixture(scope="module")
def deployed(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageContext]:
    # The third replica never starts, but it turns Serve's autoscaler on.
    replicas = {"min_replicas": 2, "max_replicas": 3, "target_ongoing_requests": 1000.0}
    ingress = {"replicas": 2}
    context = serve_context(tmp_path_factory.mktemp("runs"), SLOWER, baseline=False, ingress=ingress, **replicas)
    serve.run(context)
    until(lambda: len(alive("Target")) == len(alive("Reference")) == 2)
    yield context
    ray_serve.shutdown()


def alive(deployment: str) -> list[Any]:
    """Actors of the replicas of a deployment."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    replicas = [a for a in actors if a["name"].startswith(f"SERVE_REPLICA::tiny#{deployment}#")]
    return [ray.get_actor(a["name"], namespace=a["namespace"]) for a in replicas]


def kill_one(deployment: str) -> None:
    for actor in alive(deployment)[:1]:
        ray.kill(actor)


def ask(context: StageContext, seed: int, stream: bool, started: threading.Semaphore | None = None) -> Reply:
    with httpx.Client(timeout=200, trust_env=False) as http:
        return clients.ask(http, serve.endpoint(context.recipe), words(seed, TOKENS, stream, policy=POLICY), started)


def undisturbed(context: StageContext, seeds: range, **changes: Any) -> list[str]:
    """The library's answers."""
    return list(texts(context, seeds, TOKENS, policy=POLICY, **changes).values())


def reused_tokens() -> float:
    """Context tokens found in the caches of all reference replicas so far."""
    names = {"application": "tiny", "deployment": "Reference"}
    samples = [sample for family in of_ray() for sample in family.samples if names.items() <= sample.labels.items()]
    return sum(sample.value for sample in samples if sample.name == "ray_rcd_reused_tokens_total")


def test_the_blocks_of_a_request_reach_the_replica_that_caches_its_context(deployed: StageContext) -> None:
    """Each call reuses everything before the previous block. Spread over two replicas it would reuse less."""
    before = reused_tokens()  # of other tests
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda seed: ask(deployed, seed, stream=False), range(101, 107)))
    starts = [answer.rcd["forwards"]["reference"] for answer in answers]
    expected = sum(BLOCK * (n - 1) * (n - 2) // 2 for n in starts)  # the prompt is shorter than a block
    assert min(starts) >= TOKENS // BLOCK and all(answer.rcd["reference_failures"] == 0 for answer in answers)
    until(lambda: reused_tokens() - before >= expected, seconds=60)
    assert reused_tokens() - before == expected


@pytest.mark.faults("a replica of the target killed", "deploy")
def test_a_killed_target_fails_no_request_and_changes_no_text(deployed: StageContext, fault_table: FaultTable) -> None:
    """Killed once each of eight streams has text, next to eight requests without stream."""
    seeds = range(1, 17)
    expected = undisturbed(deployed, seeds)
    started = threading.Semaphore(0)
    with ThreadPoolExecutor(16) as threads:
        whole = [threads.submit(ask, deployed, seed, False) for seed in seeds[8:]]
        streams = [threads.submit(ask, deployed, seed, True, started) for seed in seeds[:8]]
        for _ in range(8):
            assert started.acquire(timeout=100)
        kill_one("Target")
        answers = [future.result(timeout=300) for future in [*streams, *whole]]
    assert [answer.text for answer in answers] == expected
    assert all(answer.tokens == TOKENS for answer in answers)
    until(lambda: metrics(deployed)["retries_total"] > 0)  # of one ingress replica: either may answer
    until(lambda: len(alive("Target")) == 2)
    fault_table.add("those of 16 requests that ran on it were resumed elsewhere", "no request failed, the same texts")


def kill_proxy() -> None:
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if "SERVE_PROXY_ACTOR" in actor["name"]:
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=False)


@pytest.mark.faults("one of two ingress replicas, then the HTTP proxy killed", "deploy")
def test_after_a_killed_ingress_or_proxy_new_requests_are_answered(
    deployed: StageContext, fault_table: FaultTable
) -> None:
    """Each of eight streams is complete or breaks off, and says so; what it sent is a beginning of the right text."""
    seeds = range(1, 9)
    expected = undisturbed(deployed, seeds)
    for name, kill in (("ingress", lambda: kill_one("Ingress")), ("proxy", kill_proxy)):
        until(lambda: len(alive("Ingress")) == 2)
        started = threading.Semaphore(0)
        with ThreadPoolExecutor(8) as threads:
            streams = [threads.submit(ask, deployed, seed, True, started) for seed in seeds]
            for _ in seeds:
                assert started.acquire(timeout=100)
            kill()
            killed = time.monotonic()
            while (new := clients.ask_once(serve.endpoint(deployed.recipe), words(9, 8, False))).problem:
                assert time.monotonic() - killed < 100, new.problem
                time.sleep(0.1)
            recovery_s = time.monotonic() - killed
            answers = [future.result(timeout=300) for future in streams]
        broken = [answer for answer in answers if answer.problem]
        assert all(text.startswith(answer.text) for answer, text in zip(answers, expected, strict=True))
        assert all(answer.text == text for answer, text in zip(answers, expected, strict=True) if not answer.problem)
        if name == "ingress":
            assert recovery_s < 10, "the other replica answers"
        else:
            assert len(broken) == 8, "the proxy carries every stream"
        happened = f"{name}: {len(broken)} of 8 streams broke off without [DONE], the others were complete"
        fault_table.add(happened, "new requests were answered", recovery_s=recovery_s)


@pytest.mark.faults("all replicas of the reference killed, again and again", "deploy")
def test_decoding_continues_without_the_reference_and_reports_it(
    deployed: StageContext, fault_table: FaultTable
) -> None:
    """The reference's replicas are killed whenever they return, until the answer is complete."""
    [expected] = undisturbed(deployed, range(5, 6))
    started, stop = threading.Semaphore(0), threading.Event()

    def keep_killing() -> None:
        while not stop.wait(0.2):
            for actor in alive("Reference"):  # together, or a second try may always find the other one
                ray.kill(actor)

    with ThreadPoolExecutor(2) as threads:
        stream = threads.submit(ask, deployed, 5, True, started)
        assert started.acquire(timeout=100)
        killer = threads.submit(keep_killing)
        try:
            answer = stream.result(timeout=300)
        finally:
            stop.set()
        killer.result()
    assert answer.tokens == TOKENS
    assert answer.rcd["reference_failures"] > 0 and answer.rcd["forwards"]["reference"] > 0
    until(lambda: len(alive("Reference")) == 2, seconds=200)

    def recovered() -> bool:
        answer = ask(deployed, 5, False)
        return bool(answer.rcd["reference_failures"] == 0 and answer.text == expected)

    until(recovered, seconds=100)
    fault_table.add(
        "the answer continued without it and reported so; with the replicas back it was used again", "no request failed"
    )
