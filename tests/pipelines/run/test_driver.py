"""The driver, with small stages: skip, refuse, redo, stop, kill, one job per run. Processes are real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.recipe.load import load_recipe
from pipelines.run.driver import main
from pipelines.run.lease import read_lease
from pipelines.run.messages import user_message
from pipelines.run.stages import stages_of
from rcd_core.errors import UserError
from tests.pipelines.run import fake_job

ROOT = Path(__file__).resolve().parents[3]


def job(store: Path, *arguments: str) -> int:
    return main(["--storage", str(store), *arguments], registry=fake_job.stages)


def calls(store: Path) -> list[str]:
    """The stages that ran since the last look."""
    path = store / "calls.txt"
    lines = path.read_text().split() if path.exists() else []
    path.write_text("")
    return lines


@pytest.fixture
def done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A storage directory with a finished run."""
    assert job(tmp_path) == 0
    assert calls(tmp_path) == ["first", "second", "third"]
    capsys.readouterr()
    return tmp_path


def state(store: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def test_a_finished_run_is_skipped_and_reports_again(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert job(done) == 0
    assert calls(done) == []
    out = capsys.readouterr().out
    assert "third: skipped, done" in out and "report: first;second;third;" in out
    assert read_lease(str(done / "demo")) is None
    assert load_recipe(str(done / "demo" / "recipe.yaml")) == load_recipe("demo", [f"storage={done}"])
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_settings_are_refused_with_the_difference(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(done)
    assert job(done, "--set", "signals.top_k=9", "--set", "evaluate.thresholds=[0.5]") == 2
    message = capsys.readouterr().err
    assert "second: signals.top_k: 32 there, 9 now" in message
    assert f"third: evaluate.thresholds: {list(load_recipe('demo').evaluate.thresholds)} there, [0.5] now" in message
    assert "--redo second" in message and "--set name=NAME" in message
    assert state(done) == before


def test_what_changes_no_result_is_no_difference(done: Path) -> None:
    sets = ["evaluate.batch_size=7", "resources.num_workers=4", "deploy.port=81"]
    assert job(done, *(part for override in sets for part in ("--set", override))) == 0
    assert calls(done) == []


def test_redo_makes_a_stage_and_its_dependents_again(done: Path) -> None:
    assert job(done, "--set", "signals.top_k=9", "--redo", "second") == 0
    assert calls(done) == ["second", "third"]
    assert job(done, "--set", "signals.top_k=9") == 0 and calls(done) == []


def test_a_failure_leaves_what_was_done_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "1")
    assert job(tmp_path) == 2
    assert "error: second.thing is wrong" in capsys.readouterr().err
    assert read_lease(str(tmp_path / "demo")) is None
    monkeypatch.delenv("FAKE_FAIL")
    calls(tmp_path)
    assert job(tmp_path) == 0 and calls(tmp_path) == ["second", "third"]
    manifest = json.loads((tmp_path / "demo" / "second" / "manifest.json").read_text())
    assert manifest["summary"] == {"resumed": True}


def test_partial_results_of_other_settings_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "1")
    assert job(tmp_path) == 2
    monkeypatch.delenv("FAKE_FAIL")
    assert job(tmp_path, "--set", "signals.top_k=9") == 0
    manifest = json.loads((tmp_path / "demo" / "second" / "manifest.json").read_text())
    assert manifest["summary"] == {"resumed": False}


def test_stages_alone_need_their_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job(tmp_path, "--stages", "second") == 2
    assert "--stages: first" in capsys.readouterr().err
    assert job(tmp_path, "--stages", "first,second") == 0
    assert job(tmp_path, "--stages", "thrid") == 2
    assert "did you mean 'third'?" in capsys.readouterr().err
    assert job(tmp_path, "--stages", "") == 2 and job(tmp_path, "--stages", " ,") == 2
    assert capsys.readouterr().err.count("--stages is ") == 2, "nothing is not everything"
    assert job(tmp_path, "--stages", "third", "--redo", "first") == 2
    assert "--redo first" in capsys.readouterr().err
    assert job(tmp_path, "--stages", "th*") == 0
    assert calls(tmp_path) == ["first", "second", "third"]


def test_a_stage_program_runs_its_own_stages_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--storage", str(tmp_path)]
    assert main(arguments, only=("first",), registry=fake_job.stages) == 0
    assert calls(tmp_path) == ["first"]
    assert main([*arguments, "--stages", "second"], only=("first",), registry=fake_job.stages) == 2
    assert "full.py" in capsys.readouterr().err


def test_dry_run_shows_and_changes_nothing(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(done)
    assert job(done, "--dry-run") == 0
    out = capsys.readouterr().out
    assert f"storage: {done}" in out and "skip" in out
    assert job(done, "--dry_run", "--set", "noise.draws=9") == 2
    caught = capsys.readouterr()
    assert "refuse" in caught.out and "first: noise.draws: 4 there, 9 now" in caught.err
    assert state(done) == before


def test_storage_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert job(tmp_path / "file") == 2
    assert f"storage {tmp_path / 'file'} is not" in capsys.readouterr().err


def test_user_errors_are_found_below_other_exceptions() -> None:
    class WorkerGroupError(Exception):
        def __init__(self) -> None:
            self.worker_failures = {1: UserError("data.train: row 3 is broken")}

    try:
        raise RuntimeError("training failed") from WorkerGroupError()
    except RuntimeError as error:
        assert user_message(error) == "data.train: row 3 is broken"
    assert user_message(ValueError("a bug")) is None
    text = "Traceback:\n  ...\nrcd_core.errors.UserError: row 3 is broken\nThe above exception was the cause of another"
    assert user_message(RuntimeError(text)) == "row 3 is broken"
    full = RuntimeError("Traceback:\nOSError: [Errno 28] No space left on device\nThe above ...")
    assert "[Errno 28] No space" in str(user_message(full))


def test_the_whole_recipe_dry_runs_without_ray(tmp_path: Path) -> None:
    """full.py itself, from another directory: it finds its root, and a plan costs no Ray."""
    program = ROOT / "pipelines" / "full.py"
    assert os.access(program, os.X_OK)
    check = f"import sys, runpy; sys.argv = ['full.py', '--dry-run', '--storage', {str(tmp_path)!r}]\n"
    check += f"try: runpy.run_path({str(program)!r}, run_name='__main__')\n"
    check += "except SystemExit as end: assert end.code == 0 and 'ray' not in sys.modules, sys.modules.keys()"
    result = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for stage in stages_of(load_recipe("demo")):
        assert stage in result.stdout
    assert "2 x (CPU 1)" in result.stdout and not any(tmp_path.iterdir())


# -- processes that are stopped and killed ---------------------------------------------------------------------------

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts fake_job as a program; what is left at the end is killed."""
    running: list[subprocess.Popen[str]] = []

    def launch(*arguments: str, hang: bool = False) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FAKE_")}
        environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | ({"FAKE_HANG": "1"} if hang else {})
        command = [
            sys.executable,
            str(ROOT / "tests/pipelines/run/fake_job.py"),
            "--storage",
            str(tmp_path),
            *arguments,
        ]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
        )
        running.append(process)
        if hang:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("hanging"):
                    return process
            pytest.fail("the job ended before it hung")
        return process

    yield launch
    for process in running:
        process.kill()
        process.wait()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def test_killed_in_a_stage_the_next_job_takes_over_and_goes_on(tmp_path: Path, start: Start) -> None:
    victim = start(hang=True)
    victim.kill()
    victim.wait()
    second = tmp_path / "demo" / "second"
    assert (second / "key.json").exists() and not (second / "manifest.json").exists()
    assert read_lease(str(tmp_path / "demo")) is not None
    code, out = finish(start())
    assert code == 0, out
    assert "no heartbeat: taking over the run" in out and "second: starts, was interrupted, resumes" in out
    assert calls(tmp_path) == ["first", "second", "second", "third"]
    assert json.loads((second / "manifest.json").read_text())["summary"] == {"resumed": True}
    assert read_lease(str(tmp_path / "demo")) is None


def test_sigterm_ends_quickly_and_gives_the_lease_back(tmp_path: Path, start: Start) -> None:
    holder = start(hang=True)
    refused_code, refused = finish(start())  # a second job meanwhile
    assert refused_code == 2
    assert f"is in use by process {holder.pid} on " in refused and f"`kill {holder.pid}`" in refused
    began = time.monotonic()
    holder.send_signal(signal.SIGTERM)
    code, out = finish(holder)
    assert time.monotonic() - began < 20.0, "not after the stage, which hangs"
    assert code == 143 and "run the same command again to resume" in out
    assert read_lease(str(tmp_path / "demo")) is None
    assert not (tmp_path / "demo" / "second" / "manifest.json").exists()


def test_a_job_that_lost_its_lease_stops(tmp_path: Path, start: Start) -> None:
    """As after a machine's long sleep: another has taken the run over, and this one must not write any more."""
    sleeper = start(hang=True)
    path = tmp_path / "demo" / "lease-another.json"
    other = {"owner": "another", "host": "elsewhere", "pid": 1, "job": "raysubmit_1", "since": "now", "beat": 1}
    other |= {"holds": True}
    sleeper.send_signal(signal.SIGSTOP)
    for own in path.parent.glob("lease-*.json"):
        own.unlink()
    path.write_text(json.dumps(other))
    sleeper.send_signal(signal.SIGCONT)
    code, out = finish(sleeper)
    assert code == 1 and "was taken over by job raysubmit_1, process 1 on elsewhere" in out
    assert json.loads(path.read_text()) == other


@pytest.mark.parametrize(
    "busy",
    [
        "import hashlib; hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**31 - 1)",  # C code that lets no handler run
        "while True:\n  try: time.sleep(60)\n  except BaseException: pass",  # Python code that swallows the exit
    ],
)
def test_a_stop_does_not_wait_for_the_main_thread(tmp_path: Path, busy: str) -> None:
    program = "import time, pathlib\nfrom pipelines.run.stopping import Stopper\n"
    program += "with Stopper(lambda: pathlib.Path('cleaned').touch()):\n  print('busy', flush=True)\n  "
    program += busy.replace("\n", "\n  ")
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "busy\n"
        time.sleep(0.5)
        began = time.monotonic()
        process.terminate()
        assert process.wait(timeout=30) == 143 and time.monotonic() - began < 20.0
        assert (tmp_path / "cleaned").exists()
        assert process.stdout.read().count("stopped by SIGTERM") == 1
    finally:
        process.kill()
