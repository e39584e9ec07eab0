"""Ray's gauges of the stage that a job runs, for an alert when it stalls: rcd_stage_seconds, since it started, and
rcd_stage_idle_seconds, since it last finished a part of its work: a step, a shard or a piece. Tags: run, stage."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

INTERVAL_S = 5.0  # Ray exports every 10 s, and drops gauges that were not set since the last export
_last = time.monotonic()


def progressed() -> None:
    """Called in the driver whenever a stage has finished a part of its work."""
    global _last
    _last = time.monotonic()


@contextmanager
def stage_gauges(run: str, stage: str) -> Iterator[None]:
    """Sets the gauges while the block runs, if this process has joined a cluster."""
    stop, started = threading.Event(), time.monotonic()
    thread = threading.Thread(target=_export, args=(run, stage, started, stop), name="stage gauges", daemon=True)
    progressed()
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(INTERVAL_S)


def _export(run: str, stage: str, started: float, stop: threading.Event) -> None:
    import ray
    from ray.util.metrics import Gauge

    tags = {"run": run, "stage": stage}
    gauges: dict[str, Gauge] = {}
    while not stop.wait(INTERVAL_S):
        if not ray.is_initialized():
            continue
        if not gauges:
            for name, text in (("seconds", "Since the stage started"), ("idle_seconds", "Since it finished a part")):
                gauges[name] = Gauge(f"rcd_stage_{name}", text, tag_keys=tuple(tags))
        with suppress(Exception):  # for watching only
            now = time.monotonic()
            gauges["seconds"].set(now - started, tags)
            gauges["idle_seconds"].set(now - _last, tags)
