"""Reports from time to time that a job is still waiting."""

from __future__ import annotations

import threading
import time
from typing import Any

from rich.console import Console

from pipelines.ray_cluster.stage_gauges import progressed

EVERY_S = 30.0


class WaitReporter:
    """A context manager that prints a line whenever progress() was not called for another EVERY_S seconds."""

    def __init__(self, console: Console, what: str, total: int) -> None:
        self.console, self.what, self.total = console, what, total
        self._done, self._since, self._reported = 0, time.monotonic(), time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="waiting", daemon=True)

    def __enter__(self) -> WaitReporter:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def progress(self) -> None:
        self._done += 1
        self._since = self._reported = time.monotonic()
        progressed()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, EVERY_S)):
            now = time.monotonic()
            if now - self._reported >= EVERY_S:
                self._reported = now
                waited = f"since {now - self._since:.0f} s ({self._done} of {self.total} done)"
                self.console.print(f"  {self.what} {waited}", markup=False)
