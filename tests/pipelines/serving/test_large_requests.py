"""A client that sends 4 MiB with n = 128, again and again, does not slow the others down."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import httpx
import pytest

from tests.pipelines.serving.served_app import BASELINE, served

SMALL = {"model": BASELINE, "prompt": "the fox", "policy": "sequential", "max_tokens": 96, "stop_token_ids": []}
PAUSE_S = 0.2  # between two large requests
LARGE = 4 * 2**20  # bytes; the most that a body may have


@pytest.mark.drill
def test_large_requests_are_refused_at_once_and_delay_nobody() -> None:
    """The server and both clients have a process each. Times with and without large requests are taken in turns, so
    that other work on this machine counts for both."""
    processes = multiprocessing.get_context("spawn")
    ours, server = processes.Pipe()
    attacking, stop, refusals = processes.Event(), processes.Event(), processes.Queue()
    started = [processes.Process(target=_serve, args=(server,))]
    started[0].start()
    try:
        assert ours.poll(120)
        url = ours.recv()
        started.append(processes.Process(target=_attack, args=(url, attacking, stop, refusals)))
        started[1].start()
        seconds: dict[bool, list[float]] = {False: [], True: []}
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            for turn in range(11):
                under_attack = turn % 2 == 1
                (attacking.set if under_attack else attacking.clear)()
                time.sleep(0.5)
                times = [_seconds(client) for _ in range(4)]
                if turn:  # the first one is warmup
                    seconds[under_attack] += times
        stop.set()
        refused = refusals.get(timeout=60)
    finally:
        stop.set()
        ours.send(None)
        for process in started:
            process.join(60)
            process.kill()
    alone, attacked = statistics.median(seconds[False]), statistics.median(seconds[True])
    print(f"{len(refused)} refused in {statistics.median(refused):.3f} s; {attacked:.3f} s, alone {alone:.3f} s")
    assert len(refused) >= 5 and statistics.median(refused) < 1
    assert attacked < 2 * alone


def _seconds(client: httpx.Client) -> float:
    begun = time.monotonic()
    assert client.post("/v1/completions", json=SMALL).status_code == 200
    return time.monotonic() - begun


def _serve(parent: Connection) -> None:
    with served() as app:
        parent.send(app.url)
        parent.recv()


def _attack(url: str, attacking: Any, stop: Any, refusals: Any) -> None:
    head, tail = b'{"model": "tiny-baseline", "n": 128, "prompt": "', b'"}'
    body = head + b"x" * (LARGE - len(head) - len(tail)) + tail
    seconds = []
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        while not stop.wait(PAUSE_S):
            if attacking.is_set():
                begun = time.monotonic()
                answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
                seconds.append(time.monotonic() - begun)
                assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
    refusals.put(seconds)
