"""What /metrics says, in Prometheus' text form: requests and tokens of this process, and what each model counts."""

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
from pipelines.serving.metrics import is_counter, meaning, metric_name

STATISTICS_TIMEOUT_S = 5.0
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 600)


class ApiMetrics:
    """Of one application, since it was made. With several ingress replicas each answers for itself."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "rcd_http_requests", "Requests answered, by route and status", ["route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "rcd_http_request_seconds",
            "Time to the end of an answer",
            ["route"],
            registry=self.registry,
            buckets=_BUCKETS,
        )
        self._failed_streams = Counter(
            "rcd_http_failed_streams", "Streams that ended with an error event", ["status"], registry=self.registry
        )
        self._tokens = Counter("rcd_http_tokens", "Tokens of whole answers", ["model", "kind"], registry=self.registry)
        self._open = Gauge("rcd_http_decodes_open", "Choices that are being decoded", registry=self.registry)

    def answered(self, scope: Scope, status: int, seconds: float) -> None:
        """status 0: the client was gone before there was any."""
        route = getattr(scope.get("route"), "path", "none")
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    @contextmanager
    def decoding(self, model: str, answer: Answer) -> Iterator[None]:
        """Around the work on an answer."""
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
        """The body of the error event that ends a stream."""
        shaped = api_error(error)
        self._failed_streams.labels(str(shaped.status)).inc()
        return shaped.body()

    async def text(self, backends: Mapping[str, Backend]) -> bytes:
        """Everything, the statistics of the models as they are now; rcd_up says which could be asked."""
        asked = [asyncio.wait_for(b.statistics(), STATISTICS_TIMEOUT_S) for b in backends.values()]
        found = await asyncio.gather(*asked, return_exceptions=True)
        told = {name: stats for name, stats in zip(backends, found, strict=True) if isinstance(stats, dict)}
        registry = CollectorRegistry()
        registry.register(_Statistics(list(backends), told))
        return generate_latest(self.registry) + generate_latest(registry)


class _Statistics(Collector):
    """rcd_<name>{model=...} for every figure; a name that ends in _total is a counter."""

    def __init__(self, models: Iterable[str], told: Mapping[str, Mapping[str, float]]) -> None:
        self.models, self.told = models, told

    def collect(self) -> Iterator[Metric]:
        up = UntypedMetricFamily("rcd_up", "Whether a model could be asked for its statistics", labels=["model"])
        for model in self.models:
            up.add_metric([model], float(model in self.told))
        yield up
        for name in sorted({name for statistics in self.told.values() for name in statistics}):
            kind = CounterMetricFamily if is_counter(name) else UntypedMetricFamily
            family = kind(metric_name(name), meaning(name), labels=["model"])
            for model, statistics in self.told.items():
                if name in statistics:
                    family.add_metric([model], float(statistics[name]))
            yield family
