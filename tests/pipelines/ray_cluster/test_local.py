"""The local head of `rcd up`: it takes jobs, and `rcd down` ends all its processes and nothing else."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.cli import main as cli
from pipelines.ray_cluster import local
from pipelines.ray_cluster.local import ROOT, TOKEN, Head, _check_endpoint_port, request
from rcd_core.errors import UserError


def run(*words: str) -> str:
    """The output of a command that succeeds."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_a_head_takes_jobs_and_leaves_no_process(tmp_path: Path) -> None:
    state, port = tmp_path / "local.json", free_port()
    rcd = [sys.executable, "-m", "pipelines.cli.main"]
    up = [*rcd, "up", "--state", str(state), "--dashboard-port", str(port)]
    try:
        first = run(*up)
        head = Head.load(state)
        assert head is not None and head.dashboard == f"http://127.0.0.1:{port}"
        assert run(*up) == first  # it is reused
        with pytest.raises(AssertionError, match="--dashboard-port is 1"):
            run(*up, "--dashboard-port", "1")

        # The job's `python` is this environment's, and the repository is its working directory.
        submit = shlex.split(first.partition("Submit a job with: ")[2].partition(" python ")[0])
        code = "import sys, pipelines.full; print('runs', sys.prefix)"
        assert f"runs {sys.prefix}" in run(*submit, "python", "-c", code)

        # A command outside a job joins it without an address, and says where.
        join = "from pathlib import Path\nfrom pipelines.ray_cluster import connection as c"
        join += f"\nc.STATE = Path({str(state)!r})\nc.connect()\nimport ray"
        join += "\nprint('joined', ray.get_runtime_context().gcs_address)"
        assert f"joined {head.gcs}" in run(sys.executable, "-c", join)

        run(*submit[:-1], "--no-wait", "--", "sleep", "567")
        statuses = {job["status"] for job in json.loads(request("GET", head.dashboard + "/api/jobs/"))}
        assert statuses <= {"SUCCEEDED", "PENDING", "RUNNING"} and len(statuses) == 2
    finally:
        down = run(*rcd, "down", "--state", str(state))
    assert "stopped" in down and head.processes() == []
    assert not state.exists() and not Path(head.temp_dir).exists()
    assert "no local Ray head is running" in run(*rcd, "down", "--state", str(state))


@pytest.mark.parametrize(
    ("memory_gib", "shared_gib", "mib"),
    [(2, 1, 400), (32, 16, 3276), (32, 2, 1843), (2048, 1024, 16384), (64, 0.0625, 400)],
)
def test_the_object_store_follows_the_machine(
    memory_gib: float, shared_gib: float, mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, shared = SimpleNamespace(total=int(memory_gib * 2**30)), SimpleNamespace(free=int(shared_gib * 2**30))
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shared)
    assert local._object_store_bytes() >> 20 == mib


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shell script that is started in place of `ray`."""
    path = tmp_path / "ray"
    path.touch(mode=0o755)
    monkeypatch.setattr(local, "_RAY", str(path))
    return path


def test_a_head_that_cannot_be_seen_yet_is_waited_for(
    tmp_path: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    answers = iter([False, False, True])
    with monkeypatch.context() as early:
        early.setattr(Head, "processes", lambda head: [])
        early.setattr(Head, "answers", lambda head: next(answers))
        local.start_head(tmp_path / "local.json", free_port())
    assert local.stop_head(tmp_path / "local.json")


def test_a_head_that_ends_at_once_is_reported_with_its_log(tmp_path: Path, program: Path) -> None:
    program.write_text("#!/bin/sh\necho no memory left\nexit 1\n")
    with pytest.raises(UserError, match="did not start(.|\n)*no memory left"):
        local.start_head(tmp_path / "local.json", free_port())
    assert not (tmp_path / "local.json").exists()


def test_a_taken_dashboard_port_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        code = cli.main(["up", "--state", str(tmp_path / "local.json"), "--dashboard-port", str(port)])
    assert code == 2
    assert f"make demo DASHBOARD_PORT={port + 1}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_only_processes_with_the_token_belong_to_a_head() -> None:
    head = Head(token="t-1", dashboard="", agent="", gcs="", temp_dir="")
    environments = [{**os.environ, TOKEN: token} for token in ("t-1", "t-2")]
    own, other = (subprocess.Popen(["sleep", "60"], env=env) for env in environments)
    try:
        assert [p.pid for p in head.processes()] == [own.pid]
    finally:
        for process in (own, other):
            process.kill()
            process.wait()
    assert head.processes() == []


def test_a_damaged_state_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "local.json"
    state.write_text("{")
    assert cli.main(["down", "--state", str(state)]) == 2
    assert str(state) in capsys.readouterr().err


def test_an_endpoint_port_of_another_program_is_named() -> None:
    head = Head(token="t-3", dashboard="", agent="", gcs="", temp_dir="")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        sock.listen()
        with pytest.raises(UserError, match=f"make demo PORT={port + 1}"):
            _check_endpoint_port(head, port)
    _check_endpoint_port(head, port)  # free again


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--dashboard-port", "99999"], "--dashboard-port is 99999"),
        (["--port", "0"], "--port is 0"),
        (["--dashboard-port", "8451", "--port", "8451"], "--port is 8451, which is the dashboard's"),
        (["--port", "8265"], "--port is 8265, which is the dashboard's"),
    ],
)
def test_ports_are_checked_before_a_head_starts(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "local.json"
    assert cli.main(["up", "--state", str(state), *words]) == 2
    said = capsys.readouterr().err
    assert named in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_running_head_does_not_lend_its_dashboards_port() -> None:
    head = Head(token="t-4", dashboard="http://127.0.0.1:8451", agent="", gcs="", temp_dir="")
    with pytest.raises(UserError, match="--port is 8451, which is the dashboard's"):
        _check_endpoint_port(head, 8451)
