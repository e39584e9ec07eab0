"""A place where nothing can be written is found out before the work, whichever command it is given to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.cli import main as cli
from pipelines.cli.terminal import writable
from rcd_core.errors import UserError
from tests.pipelines.report.made_results import made


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
    assert writable("--output", str(tmp_path / "new" / "page.html")) == str(tmp_path / "new" / "page.html")
    assert writable("--output", str(tmp_path / "new")) == str(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(UserError, match="--report /proc/nothing"):
        writable("--report", "/proc/nothing/page.html")
