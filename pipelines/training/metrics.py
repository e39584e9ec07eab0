"""Metrics of a training: rank 0 writes them to <stage>/metrics.jsonl and to Ray's gauges."""

from __future__ import annotations

import json

from ray.util.metrics import Gauge

from rcd_core.io import storage


class MetricsLog:
    """Logs on rank 0 only. After a restart, lines past the resumed step are dropped, because those steps run again."""

    def __init__(self, run: str, stage: str, directory: str, rank: int, resumed_step: int) -> None:
        self.path = storage.join(directory, "metrics.jsonl") if rank == 0 else None
        self.tags = {"run": run, "stage": stage}
        self.lines: list[dict[str, float]] = []
        self.gauges: dict[str, Gauge] = {}
        if self.path and resumed_step and storage.exists(self.path):
            self.lines = [line for line in read_metrics(directory) if line["step"] <= resumed_step]

    def log(self, metrics: dict[str, float]) -> None:
        if self.path is None:
            return
        self.lines.append(metrics)
        storage.write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        for name, value in metrics.items():
            self._gauge(name).set(value)

    def _gauge(self, name: str) -> Gauge:
        """rcd_train_loss and so on, for Prometheus and Grafana, tagged with run and stage."""
        if name not in self.gauges:
            metric = "rcd_train_" + "".join(c if c.isalnum() else "_" for c in name)
            self.gauges[name] = Gauge(metric, description=f"Training: {name}", tag_keys=tuple(self.tags))
            self.gauges[name].set_default_tags(self.tags)
        return self.gauges[name]


def read_metrics(directory: str) -> list[dict[str, float]]:
    """The lines of a stage's metrics.jsonl."""
    return [json.loads(line) for line in storage.read_bytes(storage.join(directory, "metrics.jsonl")).splitlines()]
