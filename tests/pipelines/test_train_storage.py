"""Where a training's files go: a whole run in an S3 bucket, as the command line runs it, and the live TensorBoard."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.run.directory import RunDirectory, StageContext
from pipelines.training import progress
from pipelines.training.checkpoints import NUM_TO_KEEP
from pipelines.training.metrics import MetricsLog, read_metrics
from pipelines.training.progress import LiveEvents, Progress, write_events
from rcd_core import load_model
from rcd_core.io import storage
from tests.pipelines.test_job import FEW, ROOT
from tests.pipelines.test_train import recipe, training_workers
from tests.s3_server import s3_server

STAGES = ("prepare", "base", "reference", "signals", "target")
SETTINGS = [
    *FEW,
    "base.train.strategy=fsdp2",
    "base.train.log_every=1",
    "base.train.checkpoint_every=5",
    "data.num_train=256",
    "data.num_test=6",
    "variants={}",
    "resources.num_workers=2",
]


@pytest.fixture
def bucket() -> Iterator[dict[str, str]]:
    with s3_server("bucket") as environment:
        yield environment


def start(root: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """full.py on the session's cluster; its workers get `environment`, as by `ray job submit --runtime-env-json`."""
    command = [sys.executable, str(ROOT / "pipelines" / "full.py"), "--recipe", "demo", "--storage", root]
    command += ["--stages", ",".join(STAGES), *(word for s in SETTINGS for word in ("--set", s))]
    config = {"runtime_env": {"env_vars": environment or {}}}
    own = {"OMP_NUM_THREADS": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3"}
    own["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps(config)
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, text=True, env={**os.environ, **own}, **streams)


def finish(process: subprocess.Popen[str]) -> str:
    try:
        out = process.communicate(timeout=400)[0]
    finally:
        process.kill()  # changes nothing when it has ended
    assert process.returncode == 0, out
    return out


def result(run: RunDirectory, stage: str) -> dict[str, Any]:
    """The summary of a finished stage, less the name of a place."""
    manifest = run.manifest(stage)
    assert manifest is not None, f"{stage} is not done"
    return {key: value for key, value in manifest["summary"].items() if key != "reference_checkpoint"}


class Watcher:
    """Counts the checkpoints of a stage while it trains, and sends SIGKILL to one of its workers at `step`."""

    def __init__(self, directory: str, step: int) -> None:
        self.directory, self.step = directory, step
        self.before: list[dict[str, float]] = []  # metrics of the steps whose checkpoints were registered at the kill
        self.kept: list[int] = []  # checkpoints that Ray has registered
        self.found: list[int] = []  # directories of checkpoints, one of which may be under way
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watcher:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(0.05):
            try:
                (ray,) = storage.list_directories(storage.join(self.directory, "ray"))
                snapshot = storage.read_json(storage.join(ray, "checkpoint_manager_snapshot.json"))
                lines = read_metrics(self.directory)
            except (OSError, ValueError, IndexError):
                continue
            self.kept.append(len(snapshot["checkpoint_results"]))
            names = [storage.basename(path) for path in storage.list_directories(ray)]
            self.found.append(len([name for name in names if name.startswith("step-")]))
            if not self.before and lines[-1]["step"] >= self.step:
                os.kill(training_workers()[-1].pid, signal.SIGKILL)
                whole = max(int(one["checkpoint_dir_name"].split("-")[1]) for one in snapshot["checkpoint_results"])
                self.before = lines[:whole]


# -- TensorBoard, while it runs and at the end ------------------------------------------------------------------------


def losses(board: EventAccumulator) -> list[tuple[int, float]]:
    """What a TensorBoard that is open shows next: (step, loss)."""
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("train/loss")] if board.Tags()["scalars"] else []


@pytest.fixture(params=["local", "s3"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("bucket")
    return "s3://bucket/stage"


def test_an_open_tensorboard_follows_a_run(directory: str) -> None:
    """Also over a restart, which makes steps again; the board of an interrupted job before does not show."""
    path = storage.join(directory, "tensorboard")
    write_events(path, [{"step": 99, "loss": 9.0}])
    lines = [{"step": step, "loss": step / 8} for step in range(1, 8)]
    live = LiveEvents(path)
    live.update(lines[:3])
    board = EventAccumulator(path)
    assert losses(board) == [(1, 0.125), (2, 0.25), (3, 0.375)]
    live.update(lines[:2])  # resumed at step 2
    live.update(lines[:5])
    assert losses(board) == [(step, step / 8) for step in range(1, 6)]
    assert len(storage.list_files(path)) == 1, "it only grows"
    live.update(lines)
    live.close()
    assert losses(board) == [(step, step / 8) for step in range(1, 8)]


def test_a_running_stage_brings_its_board_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL_S", 0.02)
    made = recipe(tmp_path, "board")
    console = Console(file=io.StringIO())
    run = RunDirectory(made.run_directory)
    ctx = StageContext(recipe=made, run=run, stage="target", key="", inputs=(), console=console)
    path = Path(ctx.directory) / "tensorboard"
    log = MetricsLog("board", "target", ctx.directory, 0, 0)

    def shown(count: int) -> list[tuple[int, float]]:
        while not (path.exists() and len(found := losses(EventAccumulator(str(path)))) == count):
            time.sleep(0.05)
        return found

    with Progress(ctx, 8):
        log.log({"step": 1, "loss": 0.5})
        assert shown(1) == [(1, 0.5)]
        log.log({"step": 2, "loss": 0.25})
        assert shown(2) == [(1, 0.5), (2, 0.25)]
        # A restart whose metrics differ, as times do.
        MetricsLog("board", "target", ctx.directory, 0, 1).log({"step": 2, "loss": 0.75})
    write_events(str(path), read_metrics(ctx.directory))
    assert losses(EventAccumulator(str(path))) == [(1, 0.5), (2, 0.75)], "at the end, what metrics.jsonl says"


# -- minutes, run by `make drill` -------------------------------------------------------------------------------------


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_a_run_in_a_bucket_with_a_killed_worker_ends_as_on_a_disk(
    ray_cluster: str, tmp_path: Path, bucket: dict[str, str]
) -> None:
    finish(start(str(tmp_path)))
    local, remote = RunDirectory(str(tmp_path / "demo")), RunDirectory("s3://bucket/rcd/demo")
    base = remote.stage_directory("base")
    with Watcher(base, 23) as watcher:
        out = finish(start("s3://bucket/rcd", bucket))
    assert 5 <= len(watcher.before) < 60 and "base: lost a worker" in out
    assert len(storage.read_bytes(storage.join(base, "restarts.jsonl")).splitlines()) == 1
    for stage in STAGES:
        assert result(local, stage) == result(remote, stage), stage
    lines = read_metrics(base)
    assert [line["step"] for line in lines] == list(range(1, 61)), "no step is logged twice"
    assert lines[: len(watcher.before)] == watcher.before, "with the speeds measured then: not made again"

    assert max(watcher.kept) == NUM_TO_KEEP
    assert max(watcher.found) <= NUM_TO_KEEP + 1, "those that are kept and the next one, under way"
    assert not storage.exists(storage.join(base, "ray"))
    assert storage.list_files(storage.join(base, "tensorboard"))
    model, same = load_model(storage.join(base, "model")), load_model(str(tmp_path / "demo" / "base" / "model"))
    assert all(a.equal(b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
