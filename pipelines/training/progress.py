"""What the driver shows while Ray Train runs: lines on the console, and TensorBoard events made from metrics.jsonl."""

from __future__ import annotations

import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from pipelines.ray_cluster.stage_gauges import progressed
from pipelines.run.directory import StageContext
from pipelines.run.keys import recipe_values
from pipelines.run.progress import duration
from pipelines.training.metrics import read_metrics
from pipelines.training.trackers import Tracker
from rcd_core.io import storage

INTERVAL_S = 15.0
LINES_PER_FILE = 1000


class Progress:
    """While the block runs: every INTERVAL_S seconds a line on the console and an update of TensorBoard and of the
    recipe's trackers, from what rank 0 has logged; also a line for every restart."""

    def __init__(self, ctx: StageContext, steps: int) -> None:
        self.ctx, self.steps = ctx, steps
        self.events = LiveEvents(storage.join(ctx.directory, "tensorboard"))
        self.trackers = _trackers(ctx)
        self.restarts = storage.join(ctx.directory, "restarts.jsonl")
        self.num_restarts = self._count_restarts()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        self.thread.join()  # it must not write after this block
        self.events.close()
        lines = []
        with suppress(Exception):
            lines = read_metrics(self.ctx.directory)
        for tracker in self.trackers:
            tracker.update(lines)
            tracker.close()

    def _watch(self) -> None:
        first: tuple[float, int] | None = None
        begun, step = time.monotonic(), -1
        while not self.stop.wait(INTERVAL_S):
            self._report_restarts()
            try:
                lines = read_metrics(self.ctx.directory)
                last = lines[-1]
            except Exception:  # none are there yet, or the storage has a problem; the job goes on
                if first is None:
                    so_far = duration(time.monotonic() - begun)
                    self.ctx.console.print(f"  {self.ctx.stage}: no step is logged yet, {so_far} so far")
                continue
            self.events.update(lines)
            for tracker in self.trackers:
                tracker.update(lines)
            if step == last["step"]:
                continue
            progressed()
            now, step = time.monotonic(), int(last["step"])
            first = first or (now, step)
            rate = (step - first[1]) / (now - first[0]) if now > first[0] else 0.0
            left = f", {rate:.1f} steps/s, {duration((self.steps - step) / rate)} left" if rate > 0 else ""
            self.ctx.console.print(f"  {self.ctx.stage}: step {step} of {self.steps}, loss {last['loss']:.4f}{left}")

    def _count_restarts(self) -> int:
        try:
            return len(storage.read_bytes(self.restarts).splitlines())
        except Exception:
            return 0

    def _report_restarts(self) -> None:
        count = self._count_restarts()
        if count > self.num_restarts:
            text = f"  {self.ctx.stage}: a worker failed, resumes from the last checkpoint ({self.restarts})"
            self.ctx.console.print(text, markup=False, soft_wrap=True)
            self.num_restarts = count


def _trackers(ctx: StageContext) -> list[Tracker]:
    recipe = ctx.recipe
    section = ctx.stage.split("-")[0]
    section = "target" if section in ("round", "baseline") else section  # which train with its settings
    settings = recipe_values(recipe, (section, "data", "noise", "block_length", "seed"))
    name, project = f"{recipe.name}/{ctx.stage}", recipe.tracker_project or "rcd"

    def say(text: str) -> None:
        ctx.console.print(f"  {ctx.stage}: {text}", markup=False, soft_wrap=True)

    return [Tracker(tool, project, name, settings, say) for tool in recipe.trackers]


class LiveEvents:
    """TensorBoard events of a running training in files that only grow, so that an open TensorBoard keeps reading.

    Object stores cannot append, so there a file is uploaded again after each update, until it has LINES_PER_FILE lines.
    A problem of the storage is left to the end of the training, which writes all events again.
    """

    def __init__(self, board: str) -> None:
        self.board, self.step, self.num_lines = board, 0, 0
        self.writer: Any = None
        self._stack = ExitStack()

    def update(self, lines: list[dict[str, float]]) -> None:
        """Add the lines after the last update. Steps that a restart runs again are not added twice."""
        new = [line for line in lines if line["step"] > self.step]
        try:
            if new:
                self._add(new)
        except Exception:  # such a writer stays broken
            self.close()

    def close(self) -> None:
        with suppress(Exception):
            self._stack.close()
        self.writer = None

    def _add(self, lines: list[dict[str, float]]) -> None:
        if self.writer is None:
            self.writer, self.num_lines = self._open(), 0
        _add_scalars(self.writer, lines)
        self.writer.flush()
        self.num_lines += len(lines)
        if self.writer.log_dir != self.board:
            storage.upload_dir(self.writer.log_dir, self.board)
            if self.num_lines >= LINES_PER_FILE:
                self.close()
        self.step = int(lines[-1]["step"])

    def _open(self) -> Any:
        if not self.step:
            storage.remove(self.board)  # of an interrupted job
        remote = storage.is_uri(self.board)
        directory = self._stack.enter_context(tempfile.TemporaryDirectory()) if remote else self.board
        return self._stack.enter_context(SummaryWriter(directory))


def write_events(board: str, lines: list[dict[str, float]]) -> None:
    """Replace the TensorBoard events by ones made from all metrics, once the training is done."""
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
