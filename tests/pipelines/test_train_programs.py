"""Trainings as programs that the command line starts: in an S3 bucket with a killed worker, and stopped by signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.run.directory import RunDirectory
from pipelines.training.metrics import read_metrics
from rcd_core import load_model
from rcd_core.io import storage
from tests.cluster.nodes import elsewhere, local_nodes
from tests.fault_table import FaultTable
from tests.pipelines.test_job import FEW, ROOT
from tests.pipelines.training_run import Killer, checkpoint_steps, losses, training_workers
from tests.s3_server import s3_server

STAGES = ("prepare", "base", "reference", "signals", "target")
SETTINGS = [*FEW, "data.num_train=256", "data.num_test=6", "variants={}", "resources.num_workers=2"]
SETTINGS += ["base.train.log_every=1"]
pytestmark = [pytest.mark.drill, pytest.mark.timeout(2400)]


def start(
    program: str,
    root: str,
    stages: Sequence[str],
    *settings: str,
    environment: dict[str, str] | None = None,
    address: str | None = None,
) -> subprocess.Popen[str]:
    """Start a stage file on the session's cluster, or that at `address`. Its workers get `environment`, as with
    --runtime-env-json."""
    command = [sys.executable, str(ROOT / "pipelines" / program), "--recipe", "sudoku-reference", "--storage", root]
    command += ["--stages", ",".join(stages), *(word for s in [*SETTINGS, *settings] for word in ("--set", s))]
    own = {"OMP_NUM_THREADS": "1", **({"RAY_ADDRESS": address} if address else {})}
    if environment:
        own["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.3"
        own["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"runtime_env": {"env_vars": environment}})
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, text=True, env={**os.environ, **own}, **streams)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        out = process.communicate(timeout=900)[0]
    finally:
        process.kill()  # has no effect on a process that has ended
    assert process.returncode == code, out
    return out


# -- in a bucket


@pytest.fixture
def bucket() -> Iterator[dict[str, str]]:
    with s3_server("bucket") as environment:
        yield environment


def result(run: RunDirectory, stage: str) -> dict[str, Any]:
    """The summary of a finished stage without the path of a checkpoint."""
    manifest = run.manifest(stage)
    assert manifest is not None, f"{stage} is not done"
    return {key: value for key, value in manifest["summary"].items() if key != "reference_checkpoint"}


class Watcher(Killer):
    """Also counts the checkpoints of the stage during training."""

    def __init__(self, directory: str, step: int) -> None:
        super().__init__(directory, step)
        self.before: list[dict[str, float]] = []  # metrics up to the last checkpoint registered at the kill
        self.kept: list[int] = []  # checkpoints registered by Ray
        self.directories: list[int] = []  # directories of checkpoints; one may be incomplete
        self.started = time.time()
        self.downloads: list[list[Path]] = []  # checkpoints on this machine, while the training runs after the kill

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
            self.directories.append(len([name for name in names if name.startswith("step-")]))
            if self.before and lines[-1]["step"] > self.step + 10:
                found = Path(tempfile.gettempdir()).glob("checkpoint_tmp_*")
                self.downloads.append([path for path in found if path.stat().st_ctime > self.started])
            if not self.before and lines[-1]["step"] >= self.step:
                os.kill(training_workers()[-1].pid, signal.SIGKILL)
                whole = max(int(one["checkpoint_dir_name"].split("-")[1]) for one in snapshot["checkpoint_results"])
                self.before = lines[:whole]


def test_a_run_in_a_bucket_with_a_killed_worker_gives_the_results_of_a_local_run(
    ray_cluster: str, tmp_path: Path, bucket: dict[str, str]
) -> None:
    often = ("base.train.strategy=fsdp2", "base.train.checkpoint_every=5", "base.train.keep_checkpoints=3")
    finish(start("full.py", str(tmp_path), STAGES, *often))
    local, remote = RunDirectory(str(tmp_path / "sudoku-reference")), RunDirectory("s3://bucket/rcd/sudoku-reference")
    base = remote.stage_directory("base")
    with Watcher(base, 23) as watcher:
        out = finish(start("full.py", "s3://bucket/rcd", STAGES, *often, environment=bucket))
    assert 5 <= len(watcher.before) < 60 and "base: a worker failed" in out
    assert len(storage.read_bytes(storage.join(base, "restarts.jsonl")).splitlines()) == 1
    for stage in STAGES:
        assert result(local, stage) == result(remote, stage), stage
    lines = read_metrics(base)
    assert [line["step"] for line in lines] == list(range(1, 61)), "no step is logged twice"
    assert lines[: len(watcher.before)] == watcher.before, "same speeds: these steps did not run again"

    assert max(watcher.kept) == 3
    assert max(watcher.directories) <= 3 + 1, "those kept and the one being uploaded"
    assert watcher.downloads and not watcher.downloads[-1], "the resumed checkpoint is deleted once it is loaded"
    assert not storage.exists(storage.join(base, "ray"))
    assert storage.list_files(storage.join(base, "tensorboard"))
    model, same = (
        load_model(storage.join(base, "model")),
        load_model(str(tmp_path / "sudoku-reference" / "base" / "model")),
    )
    assert all(a.equal(b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


@pytest.mark.faults("an object store that refuses requests for a minute", "signals, then target")
def test_a_run_waits_for_a_store_that_refuses_requests(
    ray_cluster: str, tmp_path: Path, fault_table: FaultTable
) -> None:
    """503 SlowDown to everything: for 60 s while signals are computed, for 20 s during a training."""
    often = ("target.train.steps=40", "target.train.checkpoint_every=5", "target.train.log_every=1")
    finish(start("full.py", str(tmp_path), STAGES, *often))
    local, remote = RunDirectory(str(tmp_path / "sudoku-reference")), RunDirectory("s3://bucket/rcd/sudoku-reference")
    refuse, refused = tmp_path / "refuse", []
    target = remote.stage_directory("target")

    def refuse_for(seconds: float) -> None:
        refuse.touch()
        time.sleep(seconds)
        refused.append(len(refuse.read_text().splitlines()))
        refuse.unlink()

    def trouble() -> None:
        wait_until(lambda: storage.exists(storage.join(remote.stage_directory("signals"), "key.json")), seconds=300)
        refuse_for(60.0)
        wait_until(lambda: storage.exists(storage.join(target, "ray")), seconds=300)
        refuse_for(20.0)

    with s3_server("bucket", refuse) as environment:
        watcher = threading.Thread(target=trouble, daemon=True)
        watcher.start()
        finish(start("full.py", "s3://bucket/rcd", STAGES, *often, environment=environment))
        watcher.join(timeout=30)
        assert len(refused) == 2 and min(refused) > 0, "requests were refused in both stages"
        for stage in STAGES:
            assert result(local, stage) == result(remote, stage), stage
        assert [line["step"] for line in read_metrics(target)] == list(range(1, 41))
        assert not storage.exists(storage.join(target, "restarts.jsonl"))
    fault_table.add("the job waited and went on, without a restart", "the same bytes")


# -- the head restarted


def lose_the_head(root: str) -> dict[str, Any]:
    """A head and a node, both killed with the driver during a training. The job is submitted again to a new cluster."""
    often = ("base.train.checkpoint_every=10",)
    stage = Path(root, "sudoku-reference", "base")
    with local_nodes({"num_cpus": 2}, join=False, num_cpus=2) as (cluster, _):
        process = start("full.py", root, ("prepare", "base"), *often, address=cluster.address)
        wait_until(lambda: bool(checkpoint_steps(stage)), process, seconds=300)
        for node in (cluster.head_node, *cluster.worker_nodes):
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        process.kill()
        process.communicate()
    kept = read_metrics(str(stage))[: checkpoint_steps(stage)[-1]]
    began = time.monotonic()
    with local_nodes({"num_cpus": 2}, join=False, num_cpus=2) as (cluster, _):
        process = start("full.py", root, ("prepare", "base"), *often, address=cluster.address)
        wait_until(lambda: len(read_metrics(str(stage))) > len(kept), process, seconds=300)
        seconds = time.monotonic() - began
        out = finish(process)
        quiet = start("full.py", root + "/quiet", ("prepare", "base"), *often, address=cluster.address)
        finish(quiet)
    return {"kept": kept, "seconds": seconds, "out": out}


@pytest.mark.faults("the head of the cluster restarted, and the job submitted again", "base")
def test_a_job_resumes_after_its_head_was_restarted(tmp_path: Path, fault_table: FaultTable) -> None:
    found = elsewhere(lose_the_head, str(tmp_path), timeout=2000)
    stage, quiet = tmp_path / "sudoku-reference" / "base", tmp_path / "quiet" / "sudoku-reference" / "base"
    lines = read_metrics(str(stage))
    assert "prepare: skipped" in found["out"] and "base: starts, was interrupted, resumes" in found["out"]
    assert 10 <= len(found["kept"]) < 60
    assert lines[: len(found["kept"])] == found["kept"], "same speeds: these steps did not run again"
    assert losses(str(stage)) == losses(str(quiet)) and len(lines) == 60
    assert (stage / "model/model.safetensors").read_bytes() == (quiet / "model/model.safetensors").read_bytes()
    fault_table.add("the same command resumed from the last checkpoint", "the same bytes", found["seconds"])


# -- stopped


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 120
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.faults("SIGTERM, then Ctrl-C, to the driver", "base")
def test_a_stopped_training_leaves_no_worker_and_resumes_from_its_last_checkpoint(
    ray_cluster: str, tmp_path: Path, fault_table: FaultTable
) -> None:
    """SIGTERM to train.py during a training, then Ctrl-C to its second start; the third gives the same bits as an
    undisturbed run."""
    often = "base.train.checkpoint_every=10"
    finish(start("full.py", str(tmp_path / "quiet"), ("prepare", "base"), often))
    finish(start("prepare.py", str(tmp_path), ("prepare",), often))
    stage = tmp_path / "sudoku-reference" / "base"
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        before = checkpoint_steps(stage)[-1:]
        process = start("train.py", str(tmp_path), ("base",), often)
        wait_until(lambda: checkpoint_steps(stage)[-1:] > before, process)  # noqa: B023
        assert training_workers()
        process.send_signal(number)
        out = finish(process, code)
        assert out.count(f"stopped by {number.name}; run the same command again to resume") == 1, out
        assert "Traceback" not in out and "error" not in out.lower(), out
        wait_until(lambda: not training_workers())
        assert not (stage / "manifest.json").exists()
    assert 10 < checkpoint_steps(stage)[-1] < 60
    kept = read_metrics(str(stage))[: checkpoint_steps(stage)[-1]]
    out = finish(start("train.py", str(tmp_path), ("base",), often))
    assert "base: starts, was interrupted, resumes" in out

    lines = read_metrics(str(stage))
    assert lines[: len(kept)] == kept, "same speeds: these steps did not run again"
    quiet = tmp_path / "quiet" / "sudoku-reference" / "base"
    assert losses(str(stage)) == losses(str(quiet)) and len(lines) == 60
    assert (stage / "model/model.safetensors").read_bytes() == (quiet / "model/model.safetensors").read_bytes()
    assert not (stage / "restarts.jsonl").exists()
    fault_table.add("no worker was left; the same command resumed from the last checkpoint", "the same bytes")
