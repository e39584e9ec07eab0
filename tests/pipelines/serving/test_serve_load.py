"""64 clients for a minute, more than fit: streams, whole answers, infill and settings of all kinds. Every reply is a
429 or exactly the answer that its request gets alone, and memory does not grow.

`make drill` runs it, in about three minutes. RCD_LOAD_SECONDS: duration of the load, by default 60.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from ray import serve as ray_serve

from pipelines import serve
from pipelines.run.directory import StageContext
from tests.pipelines.serving.http_clients import Reply, ask, in_double_precision
from tests.pipelines.serving.serve_run import CANVAS, metrics, serve_context, until

SECONDS = float(os.environ.get("RCD_LOAD_SECONDS", "60"))
pytestmark = [pytest.mark.drill, pytest.mark.timeout(600 + int(SECONDS))]
CLIENTS = 64
# The sizes of the target in demo.yaml.
DEMO = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 192}
LIMITS = {"max_batch": 16, "max_queue": 36}  # 52 slots for 64 clients
PROCESSES = {
    "target": "ray::ServeReplica:tiny:Target",
    "reference": "ray::ServeReplica:tiny:Reference",
    "ingress": "ray::ServeReplica:tiny:Ingress",
    "proxy": "ray::ProxyActor",
}
# Allowed growth from the median of the second quarter to that of the last: a factor, and bytes of allocator noise.
GROWTH, SLACK = 1.03, 4 * 2**20
KINDS: list[dict[str, Any]] = [
    {"prompt": "words", "max_tokens": 48, "temperature": 1.0, "stop_token_ids": []},
    {"prompt": "digits 123", "max_tokens": 24, "temperature": 0.7, "return_trace": "summary"},
    {"prompt": CANVAS, "infill": True, "temperature": 0.8, "residual_top_k": 16},
    {"prompt": "words", "max_tokens": 24, "residual": False, "start": "zero", "policy": "sequential"},
    {"prompt": "456", "max_tokens": 32, "start": "zero", "block_length": 4, "denoising_steps": 2, "temperature": 1.2},
]
SEEDS = range(1, 5)


@pytest.fixture(scope="module")
def deployed(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageContext]:
    context = serve_context(tmp_path_factory.mktemp("runs"), DEMO, baseline=False, **LIMITS)
    serve.run(in_double_precision(context))
    yield context
    ray_serve.shutdown()


def request(kind: int, seed: int, stream: bool = False) -> dict[str, Any]:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return {"model": "tiny-rcd", "seed": seed, **KINDS[kind], **options}


def application_processes() -> dict[str, psutil.Process]:
    """Descendants of this process, by way of its raylet."""
    processes: dict[str, psutil.Process] = {}
    for process in psutil.Process().children(recursive=True):
        title = " ".join(process.cmdline())
        processes |= {name: process for name, prefix in PROCESSES.items() if title.startswith(prefix)}
    assert set(processes) == set(PROCESSES)
    return processes


def open_decodes(url: str) -> float:
    text = httpx.get(url + "/metrics", timeout=30, trust_env=False).text
    [line] = [line for line in text.splitlines() if line.startswith("rcd_http_decodes_open ")]
    return float(line.split()[1])


def test_a_minute_of_64_clients(deployed: StageContext) -> None:
    url = serve.endpoint(deployed.recipe)
    with httpx.Client(timeout=100, trust_env=False) as http:
        alone = {(k, s): ask(http, url, request(k, s)) for k in range(len(KINDS)) for s in SEEDS}
    assert not any(reply.problem for reply in alone.values())
    assert len({reply.text for reply in alone.values()}) > len(alone) // 2
    processes = application_processes()
    files = {name: process.num_fds() for name, process in processes.items()}
    memory: dict[str, list[int]] = {name: [] for name in processes}
    stop = threading.Event()

    def client(number: int) -> list[tuple[tuple[int, int], Reply]]:
        replies = []
        choose = random.Random(number)
        with httpx.Client(timeout=100, trust_env=False) as http:
            while not stop.is_set():
                case = choose.randrange(len(KINDS)), choose.choice(SEEDS)
                reply = ask(http, url, request(*case, stream=choose.random() < 0.5))
                replies.append((case, reply))
                if reply.status == 429:
                    stop.wait(float(reply.retry_after or 0))
        return replies

    with ThreadPoolExecutor(CLIENTS) as threads:
        started = time.monotonic()
        clients = [threads.submit(client, number) for number in range(CLIENTS)]
        try:
            while (now := time.monotonic()) < started + SECONDS:
                for name, process in processes.items():
                    memory[name].append(process.memory_info().rss)
                time.sleep(max(0.0, now + 0.5 - time.monotonic()))
        finally:
            stop.set()
        replies = [pair for future in clients for pair in future.result(timeout=100)]
    seconds = max(reply.ended for _, reply in replies) - started

    _print_table([reply for _, reply in replies], seconds, memory)
    answered = [(case, reply) for case, reply in replies if reply.status == 200]
    refused = [reply for _, reply in replies if reply.status != 200]
    assert [reply.problem for _, reply in answered if reply.problem] == []
    assert {reply.status for reply in refused} <= {429}, [r.problem for r in refused if r.status != 429][:3]
    assert refused, "every client got a slot, so refusals were not tested"
    assert all(float(r.retry_after or 0) >= 1 for r in refused)
    assert all(json.loads(r.problem)["error"]["type"] == "rate_limit_error" for r in refused)
    assert [case for case, reply in answered if reply.text != alone[case].text] == []
    assert {case for case, _ in answered} == set(alone)
    assert all(reply.rcd["reference_failures"] == 0 for _, reply in answered)

    for name, sizes in memory.items():
        second, last = _quarter(sizes, 1), _quarter(sizes, 3)
        assert last <= GROWTH * second + SLACK, f"{name} grew from {second / 2**20:.1f} to {last / 2**20:.1f} MiB"
    until(lambda: metrics(deployed)["running"] == metrics(deployed)["queue_length"] == open_decodes(url) == 0)
    until(lambda: all(process.num_fds() <= files[name] + 8 for name, process in processes.items()), 30)


def _quarter(sizes: list[int], which: int) -> float:
    return statistics.median(sizes[which * len(sizes) // 4 : (which + 1) * len(sizes) // 4])


def _print_table(replies: list[Reply], seconds: float, memory: dict[str, list[int]]) -> None:
    """Latencies to the end of an answer in seconds, and memory in MiB."""
    print(
        f"\n{CLIENTS} clients, {seconds:.0f} s: {dict(Counter(reply.status for reply in replies))} by status,", end=" "
    )
    print(f"{sum(reply.tokens for reply in replies) / seconds:.0f} tokens/s")
    for name, stream in (("whole", False), ("stream", True)):
        answers = [reply for reply in replies if reply.status == 200 and bool(reply.body.get("stream")) == stream]
        cuts = statistics.quantiles((answer.seconds for answer in answers), n=20)
        print(f"  {name:<10} {len(answers):6} answers   p50 {cuts[9]:.2f} s   p95 {cuts[18]:.2f} s", end="")
        print(f"   first text p50 {statistics.median(r.parts[0] - r.started for r in answers if r.parts):.2f} s")
    for name, sizes in memory.items():
        start, middle, end = (f"{size / 2**20:7.1f}" for size in (sizes[0], sizes[len(sizes) // 2], sizes[-1]))
        print(f"  {name:<10} RSS MiB   start {start}   middle {middle}   end {end}", end="")
        print(f"   medians of quarters {' '.join(f'{_quarter(sizes, q) / 2**20:.1f}' for q in range(4))}")
