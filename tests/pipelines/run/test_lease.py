"""The lease on a run directory: a living holder, a killed one, one that slept, and jobs that start together."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest

from pipelines.run import lease
from pipelines.run.directory import RunDirectory
from pipelines.run.lease import Lease, read_lease
from rcd_core.errors import UserError
from rcd_core.io import storage
from tests.s3_server import s3_server

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(params=["local", "mock"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    path = f"mock://{tmp_path.name}/runs/demo" if request.param == "mock" else str(tmp_path / "runs" / "demo")
    yield path
    storage.remove(path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(lease, "TAKEOVER_S", 1.5)
    monkeypatch.setattr(lease, "_PAUSE_S", 0.2)


@pytest.mark.usefixtures("quick")
def test_a_living_holder_is_respected(directory: str) -> None:
    with Lease(directory).acquire() as holder:
        with pytest.raises(UserError, match=r"process \d+ on .*, since \d{4}-.*`kill"):
            Lease(directory).acquire()
        holder.check()
        assert read_lease(directory) is not None
    assert read_lease(directory) is None
    with Lease(directory).acquire():  # free again at once
        pass


@pytest.mark.usefixtures("quick")
def test_a_silent_holder_is_replaced_and_told(directory: str) -> None:
    lost: list[str] = []
    dead = Lease(directory, on_lost=lost.append).acquire()
    dead._ended.set()  # nobody keeps it any more
    assert dead._thread is not None
    dead._thread.join()
    dead._ended.clear()
    said: list[str] = []
    with Lease(directory).acquire(said.append):
        assert any("no heartbeat" in line for line in said)
        keeper = threading.Thread(target=dead._keep)  # the old one wakes up
        keeper.start()
        keeper.join(timeout=5)
        assert len(lost) == 1 and "was taken over by" in lost[0]
        with pytest.raises(UserError, match="was taken over"):
            RunDirectory(directory, dead).begin("base", {})
        dead.release()
        assert read_lease(directory) is not None  # another's lease is left alone


@pytest.mark.usefixtures("quick")
def test_a_silent_holder_that_wakes_between_look_and_beat_stops(directory: str) -> None:
    """It writes its file again after the file was removed. The new holder goes on."""
    sleeper = Lease(directory).acquire()
    sleeper._ended.set()
    with Lease(directory).acquire() as holder:
        sleeper._beat()
        sleeper._ended.clear()
        with pytest.raises(UserError, match="was taken over"):
            sleeper.check()
        time.sleep(5 * lease.HEARTBEAT_S)
        holder.check()
        sleeper.release()


@pytest.mark.usefixtures("quick")
def test_a_heartbeat_survives_any_error(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(directory).acquire() as holder:
        with monkeypatch.context() as patch:
            patch.setattr(storage, "list_files", lambda *_: 1 / 0)
            time.sleep(5 * lease.HEARTBEAT_S)
        beat = holder._content["beat"]
        time.sleep(5 * lease.HEARTBEAT_S)
        assert holder._content["beat"] > beat  # type: ignore[operator]


RACER = """
import sys, time
from pipelines.run import lease
from rcd_core.errors import UserError
lease.HEARTBEAT_S, lease.TAKEOVER_S, lease._PAUSE_S = 0.1, 1.5, 0.2
print("ready", flush=True)
for start in map(float, sys.stdin):
    time.sleep(max(0.0, start - time.time()))
    try:
        with lease.Lease(sys.argv[1]).acquire():
            print("held", time.time(), flush=True)
            time.sleep(0.5)
            print("until", time.time(), flush=True)
    except UserError:
        print("refused", flush=True)
"""


@pytest.mark.parametrize("store", ["local", "s3"])
def test_of_processes_that_start_together_one_holds_the_lease(store: str, tmp_path: Path) -> None:
    """Five rounds of three processes. In a round each holds the lease for a while or is refused, never two at once."""
    with s3_server("bucket") if store == "s3" else nullcontext():
        race("s3://bucket/run" if store == "s3" else str(tmp_path))


def race(directory: str) -> None:
    command = [sys.executable, "-c", RACER, directory]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for _ in range(5):
            held = []
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(f"{time.time() + 0.1}\n")
                process.stdin.flush()
            for process in processes:
                assert process.stdout is not None
                word, *when = process.stdout.readline().split()
                if word == "held":
                    held.append((float(when[0]), float(process.stdout.readline().split()[1])))
            assert held and all(a[1] <= b[0] for a, b in pairwise(sorted(held))), held
        for process in processes:
            process.communicate(timeout=30)
        assert read_lease(directory) is None
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_submitted_jobs_are_named_by_what_ray_job_stop_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = {"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_7"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(metadata))
    holder = Lease("/nowhere")
    assert "job raysubmit_7, process" in lease.describe_lease(holder._content)
    assert "`ray job stop raysubmit_7`" in holder._refusal(holder._content)
