"""What a training says while it runs: metrics.jsonl and Ray's gauges from rank 0, lines on the console, TensorBoard."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from typing import Any

from pipelines.run.directory import StageContext
from rcd_core.io import storage

PROGRESS_EVERY_S = 15.0


class MetricsLog:
    """Rank 0's metrics, silent on the others. What an earlier attempt logged after the resumed step is dropped: it is
    made again."""

    def __init__(self, run: str, stage: str, directory: str, rank: int, resumed_step: int) -> None:
        self.path = storage.join(directory, "metrics.jsonl") if rank == 0 else None
        self.tags = {"run": run, "stage": stage}
        self.lines: list[dict[str, float]] = []
        self.gauges: dict[str, Any] = {}
        if self.path and resumed_step and storage.exists(self.path):
            self.lines = [line for line in read_metrics(directory) if line["step"] <= resumed_step]

    def log(self, metrics: dict[str, float]) -> None:
        if self.path is None:
            return
        self.lines.append(metrics)
        storage.write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        for name, value in metrics.items():
            self._gauge(name).set(value)

    def _gauge(self, name: str) -> Any:
        """rcd_train_loss and so on, for Prometheus and Grafana, tagged with run and stage."""
        from ray.util.metrics import Gauge

        if name not in self.gauges:
            metric = "rcd_train_" + "".join(c if c.isalnum() else "_" for c in name)
            gauge = Gauge(metric, description=f"Training: {name}", tag_keys=tuple(self.tags))
            gauge.set_default_tags(self.tags)
            self.gauges[name] = gauge
        return self.gauges[name]


def read_metrics(directory: str) -> list[dict[str, float]]:
    """The lines of a stage's metrics.jsonl."""
    return [json.loads(line) for line in storage.read_bytes(storage.join(directory, "metrics.jsonl")).splitlines()]


def write_events(board: str, lines: list[dict[str, float]]) -> None:
    """TensorBoard events, written once, whole, from the metrics: they cannot disagree with them."""
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as directory:
        with SummaryWriter(directory) as writer:
            _add_scalars(writer, lines)
        storage.remove(board)
        storage.upload_dir(directory, board)


def _add_scalars(writer: Any, lines: list[dict[str, float]]) -> None:
    for line in lines:
        for name, value in line.items():
            if name != "step":
                writer.add_scalar(f"train/{name}", value, int(line["step"]))


class LiveEvents:
    """TensorBoard events of a training under way, in one file that only grows: a TensorBoard that is open reads on
    where it stopped. Nothing can be appended in an object store, so there the same bytes and more are uploaded."""

    def __init__(self, board: str) -> None:
        self.board, self.step = board, 0
        self.writer: Any = None
        self._stack = ExitStack()

    def update(self, lines: list[dict[str, float]]) -> None:
        """Add what came after the last update. Steps that a restart makes again are there already."""
        new = [line for line in lines if line["step"] > self.step]
        if not new:
            return
        if self.writer is None:
            self.writer = self._open()
        _add_scalars(self.writer, new)
        self.writer.flush()
        self.step = int(new[-1]["step"])
        if self.writer.log_dir != self.board:
            storage.upload_dir(self.writer.log_dir, self.board)

    def close(self) -> None:
        with suppress(OSError):  # a full disk is for the training to tell
            self._stack.close()

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        storage.remove(self.board)  # an interrupted job's
        remote = storage.is_uri(self.board)
        directory = self._stack.enter_context(tempfile.TemporaryDirectory()) if remote else self.board
        return self._stack.enter_context(SummaryWriter(directory))


class Progress:
    """While fit() blocks the driver: now and then a line on the console and TensorBoard brought up to date from what
    rank 0 has logged; every restart."""

    def __init__(self, ctx: StageContext, steps: int) -> None:
        self.ctx, self.steps = ctx, steps
        self.events = LiveEvents(storage.join(ctx.directory, "tensorboard"))
        self.restarts = storage.join(ctx.directory, "restarts.jsonl")
        self.num_restarts = self._count_restarts()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        self.thread.join()  # nothing is written behind the back of what comes after
        self.events.close()

    def _watch(self) -> None:
        seen: list[tuple[float, int]] = []
        while not self.stop.wait(PROGRESS_EVERY_S):
            self._say_restarts()
            try:
                lines = read_metrics(self.ctx.directory)
                line = lines[-1]
            except (OSError, ValueError, IndexError):
                continue
            with suppress(OSError):
                self.events.update(lines)
            if seen and seen[-1][1] == line["step"]:
                continue
            seen.append((time.monotonic(), int(line["step"])))
            (t0, s0), (t1, s1) = seen[0], seen[-1]
            rate = (s1 - s0) / (t1 - t0) if len(seen) > 1 else 0.0
            left = f", {rate:.1f} steps/s, {(self.steps - s1) / rate:.0f} s left" if rate > 0 else ""
            self.ctx.console.print(f"  {self.ctx.stage}: step {s1} of {self.steps}, loss {line['loss']:.4f}{left}")

    def _count_restarts(self) -> int:
        try:
            return len(storage.read_bytes(self.restarts).splitlines())
        except OSError:
            return 0

    def _say_restarts(self) -> None:
        count = self._count_restarts()
        if count > self.num_restarts:
            text = f"  {self.ctx.stage}: lost a worker, goes on from the last checkpoint ({self.restarts})"
            self.ctx.console.print(text, markup=False, soft_wrap=True)
            self.num_restarts = count
