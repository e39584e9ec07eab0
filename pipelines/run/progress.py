"""What the terminal that submitted a job shows of a long stage: what is done, and how long the rest takes."""

from __future__ import annotations

import threading
import time
from typing import Any

from rich.console import Console

EVERY_S = 15.0  # between two lines


class Countdown:
    """Lines like "signals: 40 of 120 shards, 6.5 minutes left", at most one every EVERY_S seconds and none at the end.

    done: what an earlier job did, which says nothing about the speed of this one.
    """

    def __init__(self, console: Console, what: str, total: int, unit: str, done: int = 0) -> None:
        self.console, self.what, self.total, self.unit = console, what, total, unit
        self.before = self.done = done
        self.started = self.printed = time.monotonic()

    def add(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.printed < EVERY_S or self.done >= self.total:
            return
        self.printed = now
        rest = (now - self.started) / max(1, self.done - self.before) * (self.total - self.done)
        text = f"  {self.what}: {self.done:,} of {self.total:,} {self.unit}, {duration(rest)} left"
        self.console.print(text, markup=False, soft_wrap=True)


class StillWorking:
    """While the block runs: a line every EVERY_S seconds that says for how long. For work whose amount is not known."""

    def __init__(self, console: Console, what: str) -> None:
        self.console, self.what = console, what
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="still working", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        started = time.monotonic()
        while not self._stop.wait(EVERY_S):
            text = f"  {self.what}: {duration(time.monotonic() - started)} so far"
            self.console.print(text, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """In the largest unit of which there are two or more, in seconds below that."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 or not seconds else f"{seconds:.2g} s"
