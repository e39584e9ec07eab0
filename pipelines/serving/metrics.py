"""The figures of a model: names and meanings, the same in /metrics and in Ray's metrics, and their export to Ray.

Figures are read every few seconds and passed on by their differences, so that no pass pays for them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping

from ray.serve.metrics import Counter, Gauge

INTERVAL_S = 5.0  # Ray sends metrics on every 10 s and forgets a gauge that was not set since
_KINDS = ("prefill", "denoise", "store", "reference")
_MEANINGS = {
    "requests_total": "Requests answered to their end",
    "tokens_total": "Tokens of the answers",
    "cancelled_total": "Requests whose client was gone before the end",
    "failed_total": "Requests lost because a pass failed",
    "reference_failures_total": "Blocks that started from zero because the reference could not answer",
    "retries_total": "Tries after which a request went to another replica",
    "admitted_total": "Requests that got a place in the batch",
    "queue_seconds_total": "Time they waited for it, before their first pass",
    "queue_length": "Requests that wait for a place in the batch",
    "running": "Requests in the batch",
    "replicas": "Replicas that answer",
    "reused_tokens_total": "Prompt tokens found in the cache",
    "reused_prefills_total": "Prefill passes of single requests that this saved",
    "merged_stores_total": "Finished blocks stored along with the next one's first pass",
    "choose_seconds_total": "Time of head and reduction, on a GPU with the wait for the passes",
    **{f"{kind}_passes_total": f"Batched {kind} passes" for kind in _KINDS},
    **{f"{kind}_seconds_total": f"Time of the batched {kind} passes" for kind in _KINDS},
    **{f"{kind}_forwards_total": f"{kind.capitalize()} passes of single requests, answered ones" for kind in _KINDS},
}


def metric_name(figure: str) -> str:
    """Of a figure of `statistics()`. Ray puts `ray_` before it."""
    return f"rcd_{re.sub(r'[^a-zA-Z0-9_]', '_', figure)}"


def meaning(figure: str) -> str:
    return _MEANINGS.get(figure, "Of a model")


def is_counter(figure: str) -> bool:
    return figure.endswith("_total")


class RayMetrics:
    """Of one replica; Serve tags them with its application, deployment and id."""

    def __init__(self) -> None:
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._told: dict[str, float] = {}

    def tell(self, statistics: Mapping[str, float]) -> None:
        """Names that end in _total are counters, which never fall."""
        for figure, value in statistics.items():
            if is_counter(figure):
                self._count(figure, value)
            else:
                if figure not in self._gauges:
                    self._gauges[figure] = Gauge(metric_name(figure), meaning(figure))
                self._gauges[figure].set(value)

    def _count(self, figure: str, value: float) -> None:
        if figure not in self._counters:
            counter = self._counters[figure] = Counter(metric_name(figure), meaning(figure))
            counter._record(0.0)  # `inc` refuses 0; a series that begins with its first event hides it from rate()
        more = value - self._told.get(figure, 0.0)
        if more > 0:
            self._counters[figure].inc(more)
            self._told[figure] = value


async def keep_telling(statistics: Callable[[], Awaitable[Mapping[str, float]]]) -> None:
    """Until it is cancelled."""
    metrics = RayMetrics()
    while True:
        metrics.tell(await statistics())
        await asyncio.sleep(INTERVAL_S)
