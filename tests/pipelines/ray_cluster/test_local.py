"""The local head of `make demo`: started, used, interrupted and ended for real, beside any other Ray."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.ray_cluster import local
from pipelines.ray_cluster.local_head import TOKEN, Head, request
from rcd_core.errors import UserError


def test_a_head_takes_a_job_stops_it_on_interrupt_and_leaves_no_process(tmp_path: Path) -> None:
    state = tmp_path / "local.json"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "pipelines.ray_cluster.local",
        "--state",
        str(state),
        "--dashboard-port",
        str(port),
    ]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*command, *words], cwd=local.ROOT, capture_output=True, text=True, timeout=120)
        return done

    try:
        assert run("up").returncode == 0
        head = Head.load(state)
        assert head is not None and head.dashboard == f"http://127.0.0.1:{port}"

        # The job's `python` is this environment's, and the repository is its working directory.
        job = run("submit", "--", "python", "-m", "pipelines.ray_cluster.local", "--help")
        assert (job.returncode, job.stderr) == (0, "")
        assert f"using the local Ray head at {head.dashboard}" in job.stdout
        assert "usage: python -m pipelines.ray_cluster.local" in job.stdout

        client = subprocess.Popen([*command, "submit", "--", "sleep", "567"], cwd=local.ROOT, stdout=subprocess.PIPE)
        wait_for(lambda: sleeping(head))
        client.send_signal(signal.SIGINT)
        output, _ = client.communicate(timeout=60)
        assert client.returncode == 130 and b"the job has stopped" in output
        assert not sleeping(head)
        assert {j["status"] for j in json.loads(request("GET", head.dashboard + "/api/jobs/"))} == {
            "SUCCEEDED",
            "STOPPED",
        }
    finally:
        ended = run("down")
    assert ended.returncode == 0, ended.stderr
    assert head.processes() == []
    assert not state.exists() and not Path(head.temp_dir).exists()
    assert "no local Ray head is running" in run("down").stdout


def sleeping(head: Head) -> bool:
    return any(p.name() == "sleep" for p in head.processes())


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_taken_dashboard_port_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        code = local.main(["up", "--state", str(tmp_path / "local.json"), "--dashboard-port", str(port)])
    assert code == 2
    assert f"make demo DASHBOARD_PORT={port + 1}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_only_processes_with_the_token_belong_to_a_head() -> None:
    head = Head(token="t-1", dashboard="", agent="", gcs="", temp_dir="")
    environments = [{**os.environ, TOKEN: token} for token in ("t-1", "t-2")]
    mine, other = (subprocess.Popen(["sleep", "60"], env=env) for env in environments)
    try:
        assert [p.pid for p in head.processes()] == [mine.pid]
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()
    assert head.processes() == []


def test_a_damaged_state_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "local.json"
    state.write_text("{")
    assert local.main(["down", "--state", str(state)]) == 2
    assert str(state) in capsys.readouterr().err


def test_an_endpoint_port_of_another_program_is_named() -> None:
    head = Head(token="t-3", dashboard="", agent="", gcs="", temp_dir="")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        sock.listen()
        with pytest.raises(UserError, match=f"make demo PORT={port + 1}"):
            local._check_endpoint_port(head, port)
    local._check_endpoint_port(head, port)  # free again
