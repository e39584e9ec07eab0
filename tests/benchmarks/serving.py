"""Measures what HTTP and Ray Serve cost: the deployed graph against the bare EngineThread, same requests, one thread
each.

    python -m tests.benchmarks.serving [--rounds 3] [--requests 4]

The model is random; a pass over a batch of 32 takes 30 ms or more. The systems take turns. At concurrency 1: median
time to the first text, and the difference. At concurrency 32: tokens per second of clients that each send --requests
requests one after the other, and the ratio, for answers of 64 tokens (throughput_vs_engine) and of 256. "floor" is the
smallest Ray Serve graph that streams the same text (serving_floor.py). Starts its own Ray cluster; takes minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}

import httpx  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
from httpx_sse import aconnect_sse  # noqa: E402
from ray import serve as ray_serve  # noqa: E402

from pipelines import serve  # noqa: E402
from pipelines.run.directory import StageContext  # noqa: E402
from pipelines.serving.backend import DecodeRequest, TextDelta  # noqa: E402
from pipelines.serving.engine_thread import EngineThread  # noqa: E402
from rcd_core import DecodeSettings, load_model  # noqa: E402
from tests.benchmarks import serving_floor  # noqa: E402
from tests.benchmarks.probe import header, idle_probe  # noqa: E402
from tests.pipelines.serving.serve_run import serve_context, tokenizer  # noqa: E402

SIZES = {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 768}
CLIENTS = 32
TOKENS, LONG_TOKENS = 64, 256
FIRST_BLOCKS = 40  # requests that are timed one by one
# A static schedule without stop tokens, so that every request makes the same passes on both sides.
SETTINGS: dict[str, Any] = {"denoising_steps": 4, "policy": "low_confidence_static", "stop_token_ids": ()}

Ask = Callable[[int, int], AsyncIterator[tuple[str, int]]]  # seed, length -> stream of (text, number of new tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(header(), flush=True)
    with tempfile.TemporaryDirectory(prefix="rcd-", dir="/tmp") as scratch:
        context = serve_context(Path(scratch), SIZES, baseline=False, start="zero")
        root = str(Path(__file__).resolve().parents[2])
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=200 * 1024**2,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}},
        )
        try:
            serve.run(context)
            least = serving_floor.application(
                context.checkpoint("target"), CLIENTS, {n: decode_request(0, n) for n in (TOKENS, LONG_TOKENS)}
            )
            ray_serve.run(least, name="floor", route_prefix="/floor")
            found = asyncio.run(measure(context, options.rounds, options.requests))
        finally:
            ray_serve.shutdown()
            ray.shutdown()
    found["idle_probe_after"] = idle_probe()
    print(json.dumps(found))


async def measure(context: StageContext, rounds: int, requests: int) -> dict[str, Any]:
    model = load_model(context.checkpoint("target"))
    engine = EngineThread(model, tokenizer(), None, max_batch=CLIENTS, max_length=model.max_positions, max_queue=128)
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(timeout=300, limits=limits, trust_env=False) as client:
        sides: dict[str, Ask] = {
            "engine": lambda seed, tokens: bare(engine, seed, tokens),
            "served": lambda seed, tokens: served(client, serve.endpoint(context.recipe), seed, tokens),
            "floor": lambda seed, tokens: floor(client, serve.endpoint(context.recipe), seed, tokens),
        }
        for ask in sides.values():  # warm
            await throughput(ask, 1, TOKENS)
        first: dict[str, list[float]] = {name: [] for name in sides}
        for seed in range(FIRST_BLOCKS):
            for name, ask in sides.items():
                first[name].append(await to_first_text(ask, seed))
        rates: dict[int, dict[str, list[float]]] = {n: {name: [] for name in sides} for n in (TOKENS, LONG_TOKENS)}
        pass_ms: list[float] = []
        for _ in range(rounds):
            for tokens, by_side in rates.items():
                for name, ask in sides.items():
                    before = await engine.statistics()
                    by_side[name].append(await throughput(ask, max(1, requests * TOKENS // tokens), tokens))
                    if name == "engine":
                        pass_ms.append(mean_pass(before, await engine.statistics()))
    engine.close()
    medians = {name: 1e3 * statistics.median(values) for name, values in first.items()}
    typical = {n: {name: statistics.median(values) for name, values in r.items()} for n, r in rates.items()}
    return {
        "first_block_added_ms": medians["served"] - medians["engine"],
        "throughput_vs_engine": typical[TOKENS]["served"] / typical[TOKENS]["engine"],
        "floor_vs_engine": typical[TOKENS]["floor"] / typical[TOKENS]["engine"],
        f"throughput_vs_engine_{LONG_TOKENS}": typical[LONG_TOKENS]["served"] / typical[LONG_TOKENS]["engine"],
        f"floor_vs_engine_{LONG_TOKENS}": typical[LONG_TOKENS]["floor"] / typical[LONG_TOKENS]["engine"],
        "first_block_ms": medians,
        "tokens_per_second": rates,
        "pass_ms": statistics.median(pass_ms),
        "clients": CLIENTS,
    }


def mean_pass(before: dict[str, float], after: dict[str, float]) -> float:
    """Milliseconds of a denoising pass, with head and reduction."""
    spent = {name: after[name] - before[name] for name in after}
    return 1e3 * (spent["denoise_seconds_total"] + spent["choose_seconds_total"]) / spent["denoise_passes_total"]


def decode_request(seed: int, tokens: int) -> DecodeRequest:
    settings = DecodeSettings(max_new_tokens=tokens, seed=seed, temperature=1.0, **SETTINGS)
    return DecodeRequest(
        prompt=prompt(seed), messages=None, infill=False, settings=settings, fixed_length=True, stop=()
    )


async def bare(engine: EngineThread, seed: int, tokens: int) -> AsyncIterator[tuple[str, int]]:
    async for event in engine.stream(decode_request(seed, tokens)):
        if isinstance(event, TextDelta):
            yield event.text, len(event.token_ids)


async def served(client: httpx.AsyncClient, endpoint: str, seed: int, tokens: int) -> AsyncIterator[tuple[str, int]]:
    body = {"model": "tiny-rcd", "prompt": prompt(seed), "max_tokens": tokens, "seed": seed, "temperature": 1.0}
    body |= {**SETTINGS, "stop_token_ids": [], "stream": True, "stream_options": {"include_usage": True}}
    async with aconnect_sse(client, "POST", endpoint + "/v1/completions", json=body) as source:
        async for event in source.aiter_sse():
            if event.data == "[DONE]":
                return
            chunk = event.json()
            if "error" in chunk:
                raise SystemExit(f"the server answered {chunk['error']}")
            if chunk["choices"]:
                yield chunk["choices"][0]["text"], 0
            else:
                yield "", chunk["usage"]["completion_tokens"]


async def floor(client: httpx.AsyncClient, endpoint: str, seed: int, tokens: int) -> AsyncIterator[tuple[str, int]]:
    body = {"prompt": prompt(seed), "seed": seed, "tokens": tokens}
    async with aconnect_sse(client, "POST", endpoint + "/floor/", json=body) as source:
        async for event in source.aiter_sse():
            text, count = event.json()
            yield text, count


def prompt(seed: int) -> list[int]:
    return [10 + (seed * 7 + i) % 200 for i in range(16 + seed % 32)]


async def to_first_text(ask: Ask, seed: int) -> float:
    """Seconds; the rest of the answer is waited for, so that the next one finds an idle engine."""
    begun, first = time.perf_counter(), 0.0
    async for text, _ in ask(seed, TOKENS):
        if text and not first:
            first = time.perf_counter() - begun
    return first


async def throughput(ask: Ask, requests: int, tokens: int) -> float:
    """Tokens per second of CLIENTS clients together."""

    async def one(client: int) -> int:
        return sum([count for i in range(requests) async for _, count in ask(client * requests + i, tokens)])

    begun = time.perf_counter()
    found = sum(await asyncio.gather(*(one(i) for i in range(CLIENTS))))
    seconds = time.perf_counter() - begun
    if missing := CLIENTS * requests * tokens - found:
        print(f"{missing} of {CLIENTS * requests * tokens} tokens did not arrive")
    return found / seconds


if __name__ == "__main__":
    main()
