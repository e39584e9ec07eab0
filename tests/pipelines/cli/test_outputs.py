"""A place where nothing can be written is found out before the work, whichever command it is given to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.cli import main as cli
from pipelines.cli.terminal import writable_directory, writable_file
from rcd_core.errors import UserError
from tests.pipelines.report.made_results import made

TINY = str(Path(__file__).parents[2] / "golden" / "sdar_tiny")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished evaluation."""
    (tmp_path / "run" / "evaluate").mkdir(parents=True)
    (tmp_path / "run" / "evaluate" / "results.json").write_text(json.dumps(made()))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "command",
    [
        ["report", "{run}", "--output", "{bad}"],
        ["convert", "{run}", "--output", "{bad}"],
        ["evaluate", "--target", "{run}", "--task", "sudoku", "--test", "synthetic", "--output", "{bad}"],
        ["evaluate", "--url", "http://127.0.0.1:9", "--model", "m", "--task", "sudoku", "--test", "synthetic",
         "--output", "{bad}"],
    ],
    ids=lambda command: " ".join(command[:2]),
)  # fmt: skip
def test_one_line_names_flag_and_place(
    command: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    bad = str(tmp_path / "file" / "below")
    assert cli.main([word.format(run=run, bad=bad) for word in command]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and f"--output {bad}" in said


def test_the_trial_leaves_nothing_behind(tmp_path: Path) -> None:
    assert writable_file("--output", str(tmp_path / "new" / "page.html")) == str(tmp_path / "new" / "page.html")
    assert writable_directory("--output", str(tmp_path / "new")) == str(tmp_path / "new")
    assert writable_directory("--output", str(tmp_path / "other")) == str(tmp_path / "other")
    assert not list((tmp_path / "new").iterdir()) and not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="--report /proc/nothing"):
        writable_file("--report", "/proc/nothing/page.html")


@pytest.mark.parametrize(
    "command",
    [
        ["report", "{run}", "--output", "{directory}"],
        ["report", "{run}", "--output", "{directory}/"],
        ["generate", "--model_dir", "{run}", "--prompt", "x", "--trace_file", "{directory}"],
        ["calibrate", "--target", TINY, "--task", "qa", "--data", "x", "--report", "{directory}"],
    ],
    ids=lambda command: command[0],
)
def test_a_directory_is_no_place_for_a_file(
    command: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    assert cli.main([word.format(run=run, directory=tmp_path / "there") for word in command]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and f"{command[-2]} {tmp_path / 'there'}" in captured.err
    assert not captured.out, "no work before"


def test_a_file_is_no_place_for_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.csv").write_text("mine")
    words = ["evaluate", "--target", "t", "--task", "qa", "--test", "synthetic", "--num_examples", "4"]
    assert cli.main([*words, "--output", str(tmp_path / "table.csv")]) == 2
    assert f"--output {tmp_path / 'table.csv'} is a file" in capsys.readouterr().err
    assert (tmp_path / "table.csv").read_text() == "mine"
