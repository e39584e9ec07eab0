"""Metrics of a training: rank 0 writes them to <stage>/metrics.jsonl and to Ray's gauges.

A thread writes them, so that a step never waits for the storage, and a problem never ends a training. File systems:
lines are appended. Object stores cannot append, so there lines go to parts of at most LINES_PER_PART lines,
metrics/00000.jsonl and so on, of which the last is put again every PUT_EVERY_S seconds. The driver joins the parts.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ray.util.metrics import Gauge

from rcd_core.io import storage

LINES_PER_PART = 1000
PUT_EVERY_S = 5.0
FLUSH_S = 10.0  # how long a checkpoint, and the end of a training, wait for the lines before them
logger = logging.getLogger(__name__)


class MetricsLog:
    """Logs on rank 0 only. After a restart, lines past the resumed step are dropped, because those steps run again.

    last: the newest metrics, after a restart those of the kept lines. problem: why lines are missing in the file, "" if
    none are.
    """

    def __init__(self, run: str, stage: str, directory: str, rank: int, resumed_step: int) -> None:
        self.tags = {"run": run, "stage": stage}
        self.gauges: dict[str, Gauge] = {}
        self.problem = ""
        self.last: dict[str, float] = {}
        self._active = rank == 0
        self._pending: list[str] = []
        self._changed = threading.Condition()
        self._hurry = False
        if self._active:
            self._file = _Parts(directory) if storage.is_uri(directory) else _Appended(directory)
            self._guarded(lambda: self._start(_lines_until(directory, resumed_step)))
            threading.Thread(target=self._write, name="metrics", daemon=True).start()

    def _start(self, lines: list[str]) -> None:
        if lines:  # of a training that had only its export left, there are no others
            self.last = json.loads(lines[-1])
        self._file.start(lines)

    def log(self, metrics: dict[str, float]) -> None:
        if not self._active:
            return
        self.last = metrics
        with self._changed:
            self._pending.append(json.dumps(metrics) + "\n")
            self._changed.notify_all()
        with suppress(Exception):  # gauges are for watching only
            for name, value in metrics.items():
                self._gauge(name).set(value)

    def flush(self) -> None:
        """Wait until the lines so far are written, at most FLUSH_S."""
        if self._active:
            with self._changed:
                self._hurry = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._hurry, FLUSH_S)

    def close(self) -> str:
        """Wait for the last lines. Returns why lines are missing, "" if none are."""
        self.flush()
        if self._hurry:
            self.problem = self.problem or "the storage does not answer"
        return self.problem

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._hurry)
                self._changed.wait_for(lambda: self._hurry, self._file.every_s)
                hurried, lines, self._pending = self._hurry, self._pending, []
            if self._guarded(lambda: self._file.add(lines)) and self._file.keeps_lines:  # noqa: B023
                self.problem = ""
            with self._changed:
                if hurried and not self._pending:
                    self._hurry = False
                    self._changed.notify_all()

    def _guarded(self, write: Callable[[], None]) -> bool:
        try:
            write()
            return True
        except Exception as error:
            if not self.problem:
                logger.warning("%s: metrics.jsonl cannot be written (%s); the training goes on", self.tags, error)
            self.problem = self.problem or str(error)
            return False

    def _gauge(self, name: str) -> Gauge:
        """rcd_train_loss and so on, for Prometheus and Grafana, tagged with run and stage."""
        if name not in self.gauges:
            metric = "rcd_train_" + "".join(c if c.isalnum() else "_" for c in name)
            self.gauges[name] = Gauge(metric, description=f"Training: {name}", tag_keys=tuple(self.tags))
            self.gauges[name].set_default_tags(self.tags)
        return self.gauges[name]


class _Appended:
    """metrics.jsonl on a file system. Lines for which there is no room are lost."""

    every_s, keeps_lines = 0.0, False

    def __init__(self, directory: str) -> None:
        self.path = Path(_single(directory))

    def start(self, lines: list[str]) -> None:
        if lines or self.path.exists():
            storage.write_bytes(str(self.path), "".join(lines).encode())

    def add(self, lines: list[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            size, content = file.tell(), "".join(lines).encode()
            try:
                if file.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):
                    file.truncate(size)  # no half line
                raise


class _Parts:
    """metrics/ in an object store. Lines that cannot be put are put with the next ones."""

    every_s, keeps_lines = PUT_EVERY_S, True

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.number, self.lines = 0, list[str]()

    def start(self, lines: list[str]) -> None:
        storage.remove(_parts(self.directory))
        self.add(lines)

    def add(self, lines: list[str]) -> None:
        self.lines += lines
        while self.lines:
            part = "".join(self.lines[:LINES_PER_PART]).encode()
            storage.write_bytes(storage.join(_parts(self.directory), f"{self.number:05d}.jsonl"), part)
            if len(self.lines) < LINES_PER_PART:
                return
            self.number, self.lines = self.number + 1, self.lines[LINES_PER_PART:]


def read_metrics(directory: str) -> list[dict[str, float]]:
    """The lines of a stage's metrics. Raises FileNotFoundError without any."""
    files = storage.list_files(_parts(directory)) if storage.is_uri(directory) else []
    content = b"".join(storage.read_bytes(file) for file in files or [_single(directory)])
    return [json.loads(line) for line in content.splitlines()]


def join_parts(directory: str) -> None:
    """Make metrics.jsonl of the parts, once a training is done."""
    if storage.is_uri(directory) and (lines := read_metrics(directory)):
        storage.write_bytes(_single(directory), "".join(json.dumps(line) + "\n" for line in lines).encode())
        storage.remove(_parts(directory))


def _lines_until(directory: str, step: int) -> list[str]:
    """Those of the steps before a resumed one."""
    try:
        lines = read_metrics(directory) if step else []
    except FileNotFoundError:
        return []
    return [json.dumps(line) + "\n" for line in lines if line["step"] <= step]


def _single(directory: str) -> str:
    return storage.join(directory, "metrics.jsonl")


def _parts(directory: str) -> str:
    return storage.join(directory, "metrics")
