"""/metrics in Prometheus' text format: requests and tokens of this process, and the statistics of each model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, Metric, UntypedMetricFamily
from prometheus_client.registry import Collector
from starlette.types import Scope

from pipelines.serving.backend import Backend
from pipelines.serving.http.answers import Answer
from pipelines.serving.http.errors import api_error
from pipelines.serving.metrics import description, is_counter, metric_name

STATISTICS_TIMEOUT_S = 5.0
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 600)


class ApiMetrics:
    """Metrics of one application in one process; each ingress replica has its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests answered, by route and status", "route", "status")
        text = "Time to the end of an answer"
        self._seconds = Histogram("rcd_http_request_seconds", text, ["route"], buckets=_BUCKETS, registry=self.registry)
        self._failed_streams = self._counter("failed_streams", "Streams that ended with an error event", "status")
        self._tokens = self._counter("tokens", "Tokens of complete answers", "model", "kind")
        self._open = Gauge("rcd_http_decodes_open", "Choices being decoded", registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"rcd_http_{name}", text, labels, registry=self.registry)

    def answered(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request. status 0: the client disconnected before there was one."""
        route = getattr(scope.get("route"), "path", "none")
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    @contextmanager
    def decoding(self, model: str, answer: Answer) -> Iterator[None]:
        """Count an answer while it is decoded, and its tokens at the end."""
        self._open.inc(len(answer.results))
        try:
            yield
        finally:
            self._open.dec(len(answer.results))
            if answer.complete:
                usage = answer.usage()
                for kind in ("prompt", "completion"):
                    self._tokens.labels(model, kind).inc(usage[f"{kind}_tokens"])

    def stream_failed(self, error: Exception) -> dict[str, Any]:
        """Count a failed stream. Returns the body of its error event."""
        shaped = api_error(error)
        self._failed_streams.labels(str(shaped.status)).inc()
        return shaped.body()

    async def text(self, backends: Mapping[str, Backend]) -> bytes:
        """The body of /metrics. rcd_up says which models answered with statistics."""
        calls = [asyncio.wait_for(b.statistics(), STATISTICS_TIMEOUT_S) for b in backends.values()]
        replies = zip(backends, await asyncio.gather(*calls, return_exceptions=True), strict=True)
        statistics = {name: reply for name, reply in replies if isinstance(reply, dict)}
        registry = CollectorRegistry()
        registry.register(_Statistics(list(backends), statistics))
        return generate_latest(self.registry) + generate_latest(registry)


class _Statistics(Collector):
    """rcd_<name>{model=...} for every statistic; names that end in _total are counters."""

    def __init__(self, models: Iterable[str], statistics: Mapping[str, Mapping[str, float]]) -> None:
        self.models, self.statistics = models, statistics

    def collect(self) -> Iterator[Metric]:
        up = UntypedMetricFamily("rcd_up", "Whether the model answered with its statistics", labels=["model"])
        for model in self.models:
            up.add_metric([model], float(model in self.statistics))
        yield up
        for name in sorted({name for values in self.statistics.values() for name in values}):
            kind = CounterMetricFamily if is_counter(name) else UntypedMetricFamily
            family = kind(metric_name(name), description(name), labels=["model"])
            for model, values in self.statistics.items():
                if name in values:
                    family.add_metric([model], float(values[name]))
            yield family
