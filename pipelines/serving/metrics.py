"""Metrics of a model: names and descriptions for /metrics and Ray, and the export to Ray.

The export reads the statistics every few seconds and adds up differences, so that no pass pays for it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping

from ray.serve.metrics import Counter, Gauge

INTERVAL_S = 5.0  # Ray exports every 10 s, and drops gauges that were not set since the last export
_KINDS = ("prefill", "denoise", "store", "reference")
_DESCRIPTIONS = {
    "requests_total": "Requests answered completely",
    "tokens_total": "Tokens of the answers",
    "cancelled_total": "Requests cancelled by their client",
    "failed_total": "Requests lost to a failed pass",
    "reference_failures_total": "Blocks that started from zero because the reference could not answer",
    "retries_total": "Tries after which a request moved to another replica",
    "admitted_total": "Requests that got a slot in the batch",
    "queue_seconds_total": "Time that admitted requests waited for their first pass",
    "queue_length": "Requests that wait for a slot in the batch",
    "running": "Requests in the batch",
    "replicas": "Replicas that answer",
    "reused_tokens_total": "Prompt tokens found in the cache",
    "reused_prefills_total": "Prefill passes of single requests saved by the cache",
    "merged_stores_total": "Finished blocks stored together with the next block's first pass",
    "choose_seconds_total": "Time of LM head and reduction, on a GPU with the wait for the passes",
    **{f"{kind}_passes_total": f"Batched {kind} passes" for kind in _KINDS},
    **{f"{kind}_seconds_total": f"Time of the batched {kind} passes" for kind in _KINDS},
    **{f"{kind}_forwards_total": f"{kind.capitalize()} passes of answered requests, each counted" for kind in _KINDS},
}


def metric_name(statistic: str) -> str:
    """The Prometheus name of a key of `statistics()`. Ray prepends `ray_`."""
    return f"rcd_{re.sub(r'[^a-zA-Z0-9_]', '_', statistic)}"


def description(statistic: str) -> str:
    return _DESCRIPTIONS.get(statistic, "Of a model")


def is_counter(statistic: str) -> bool:
    return statistic.endswith("_total")


class RayMetrics:
    """Of one replica. Serve tags them with application, deployment and replica."""

    def __init__(self) -> None:
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._exported: dict[str, float] = {}

    def export(self, statistics: Mapping[str, float]) -> None:
        for name, value in statistics.items():
            if is_counter(name):
                self._count(name, value)
            else:
                if name not in self._gauges:
                    self._gauges[name] = Gauge(metric_name(name), description(name))
                self._gauges[name].set(value)

    def _count(self, name: str, value: float) -> None:
        if name not in self._counters:
            counter = self._counters[name] = Counter(metric_name(name), description(name))
            counter._record(0.0)  # rate() misses the first event of a series without a 0, which `inc` rejects
        increase = value - self._exported.get(name, 0.0)
        if increase > 0:
            self._counters[name].inc(increase)
            self._exported[name] = value


async def export_metrics(statistics: Callable[[], Awaitable[Mapping[str, float]]]) -> None:
    """Export until cancelled."""
    metrics = RayMetrics()
    while True:
        metrics.export(await statistics())
        await asyncio.sleep(INTERVAL_S)
