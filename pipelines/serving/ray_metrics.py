"""What a replica counts, as metrics of Ray, which its nodes offer to Prometheus.

Figures are read every few seconds and passed on by their differences, so that no pass pays for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from ray.serve.metrics import Counter, Gauge

from pipelines.serving.metric_names import is_counter, meaning, metric_name

INTERVAL_S = 5.0  # Ray sends metrics on every 10 s and forgets a gauge that was not set since


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
