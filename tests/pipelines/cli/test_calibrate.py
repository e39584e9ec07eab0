"""`rcd calibrate` on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main as cli
from rcd_core import load_model
from rcd_core.families.files import CALIBRATION_FILE
from rcd_core.io import storage
from tests.pipelines.calibration_run import NUM


def command(*more: str) -> list[str]:
    fast = ["--policy", "low_confidence_static", "--denoising_steps", "6", "--num_examples", str(NUM)]
    return ["calibrate", "--task", "sudoku", "--data", "synthetic", *fast, *more]


def test_it_stores_and_reports(
    tiny_models: Path, calibration: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    storage.upload_dir(tiny_models / "target", str(target))
    pair = ["--target", str(target), "--reference", str(tiny_models / "reference")]
    page = tmp_path / "page.html"
    assert cli.main(command(*pair, "--dry_run", "--report", str(page))) == 0
    assert float(capsys.readouterr().out) == calibration["residual_temperature"]
    assert not (target / CALIBRATION_FILE).exists() and "Self-residuals" in page.read_text()
    assert cli.main(command(*pair, "--json")) == 0
    assert json.loads(capsys.readouterr().out)["trials"] == calibration["trials"]
    assert load_model(target).info.rcd["residual_temperature"] == calibration["residual_temperature"]


def test_without_a_reference_it_prints_what_discarded_predictions_knew(
    tiny_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command("--target", str(tiny_models / "baseline"))) == 0
    assert capsys.readouterr().out.startswith("top 1: ")
    assert not (tiny_models / "baseline" / CALIBRATION_FILE).exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--residual_temperature", "1"], "--residual_temperature"),
        (["--num_examples", "0"], "--num_examples is 0"),
        (["--data", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--data", str(Path(__file__).parent / "x.jsonl"), "--field", "what=ever"], "--field what=ever"),
    ],
)
def test_refused_flags(tiny_models: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command("--target", str(tiny_models / "target"), *more)) == 2
    assert message in capsys.readouterr().err
