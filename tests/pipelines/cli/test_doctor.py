"""`rcd doctor` on this machine, and with what it should find."""

from __future__ import annotations

import socket
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipelines.cli import doctor
from pipelines.cli.main import main


def checks(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, str]]:
    """(exit code, state by check)."""
    code = main(["doctor", "--offline", *flags])
    rows = [line.split("│")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return code, {name.strip(): state.strip() for name, state, _ in rows if name.strip()}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_what_runs_here_and_what_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = checks(capsys, "--storage", str(tmp_path / "runs"))
    assert code == 0 and not (tmp_path / "runs").exists(), "it changes nothing"
    works = ("Python", "torch", "training attention sdpa", "decoding attention sdpa", "storage")
    assert all(found[name] == "ok" for name in works)
    assert found["model hub"] == "absent" and (found["peft"] == "ok") == bool(find_spec("peft"))


def test_faults_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    code, found = checks(capsys, "--storage", str(tmp_path / "file" / "runs"))
    assert code == 1 and found["storage"] == "fault"
    monkeypatch.setattr(doctor, "_REQUIRED", ("torch", "no-such-package"))
    code, found = checks(capsys, "--storage", str(tmp_path))
    assert code == 1 and found["no-such-package"] == "fault" and found["torch"] == "ok"


def test_a_port_in_use_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(doctor, "_PORTS", {port: "a test"})
        assert checks(capsys, "--storage", str(tmp_path))[1][f"port {port}"] == "absent"
    assert checks(capsys, "--storage", str(tmp_path))[1][f"port {port}"] == "ok"
