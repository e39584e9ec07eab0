"""`rcd export`: the copy has the T_res of the run's stage calibrate, or none."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cli import main as cli
from pipelines.report.verdict import verdict
from pipelines.run.directory import RunDirectory
from rcd_core import load_model
from rcd_core.families.files import CALIBRATION_FILE
from rcd_core.io import checksums, storage
from tests.pipelines.report.made_results import made


@pytest.fixture
def run(tiny_models: Path, tmp_path: Path) -> RunDirectory:
    """A run with a target whose directory still holds the T_res that an older release stored there."""
    run = RunDirectory(str(tmp_path / "run"))
    model = Path(run.stage_directory("target")) / "model"
    run.begin("target", {"stage": "target"})
    storage.upload_dir(tiny_models / "target", str(model))
    (model / CALIBRATION_FILE).write_text('{"schema_version": 1, "residual_temperature": 9}')
    run.finish("target", {"stage": "target"}, {"fingerprint": "weights"}, datetime.now().astimezone(), 0.0)
    return run


def calibrate(run: RunDirectory, result: dict[str, Any], of: str) -> None:
    storage.write_json(storage.join(run.stage_directory("calibrate"), "calibration.json"), {"target": result})
    summary = {"residual_temperatures": {"target": result["residual_temperature"]}}
    material = {"stage": "calibrate", "inputs": {"target": of}}
    run.finish("calibrate", material, summary, datetime.now().astimezone(), 0.0)


def fingerprint(run: RunDirectory) -> str:
    manifest = run.manifest("target")
    assert manifest
    return str(manifest["fingerprint"])


def test_the_copy_has_the_chosen_temperature(run: RunDirectory, calibration: dict[str, Any], tmp_path: Path) -> None:
    calibrate(run, calibration, fingerprint(run))
    assert cli.main(["export", run.path, "--output", str(tmp_path / "copy")]) == 0
    model = load_model(tmp_path / "copy")
    assert model.info.rcd["residual_temperature"] == calibration["residual_temperature"] != 9


def test_the_copy_has_a_model_card(run: RunDirectory, tmp_path: Path) -> None:
    """With the base's licence, and the figures of an evaluation of this model, not of an earlier one."""
    base = tmp_path / "qwen"
    base.mkdir()
    recipe = {"name": "mine", "target": {"start": str(base), "train": {"steps": 7}}, "data": {"task": "gsm8k"}}
    storage.write_bytes(storage.join(run.path, "recipe.yaml"), yaml.safe_dump(recipe).encode())
    results = made() | {"tasks": {"chain": made(skill=0.2) | {"task": "chain"}}}
    storage.write_json(storage.join(run.stage_directory("evaluate"), "results.json"), results)
    cards = []
    for number, of in enumerate((fingerprint(run), "other weights")):
        material = {"stage": "evaluate", "inputs": {"target": of}}
        run.finish("evaluate", material, {}, datetime.now().astimezone(), 0.0)
        assert cli.main(["export", run.path, "--output", str(tmp_path / f"copy{number}")]) == 0
        cards.append((tmp_path / f"copy{number}" / "README.md").read_text())
        (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base")
    assert all("`qwen`" in card and "| steps | 7 |" in card and str(tmp_path) not in card for card in cards)
    assert verdict(results["tasks"]["chain"]) in cards[0] and "of the task chain" in cards[0]
    assert verdict(results) in cards[0] and "no evaluation" in cards[1] and verdict(results) not in cards[1]
    (_, before, _), (_, after, _) = (card.split("---\n", 2) for card in cards)
    assert "license" not in yaml.safe_load(before) and yaml.safe_load(after)["license"] == "apache-2.0"


def test_without_the_stage_it_has_none(run: RunDirectory, tmp_path: Path) -> None:
    assert cli.main(["export", run.path, "--output", str(tmp_path / "copy")]) == 0
    assert "calibration" not in load_model(tmp_path / "copy").info.rcd


def test_what_is_refused(
    run: RunDirectory, calibration: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(run.path, "recipe.yaml").touch()
    assert cli.main(["export", run.path, "--output", str(tmp_path / "copy"), "--stage", "baseline"]) == 2
    assert "--stage baseline" in capsys.readouterr().err
    assert cli.main(["export", run.path, "--output", run.stage_directory("target")]) == 2
    assert "--output" in capsys.readouterr().err
    calibrate(run, calibration, "other weights")
    assert cli.main(["export", run.path, "--output", str(tmp_path / "copy")]) == 2
    assert "calibrate" in capsys.readouterr().err and not (tmp_path / "copy").exists()


def test_calibrate_does_not_write_into_a_run(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    target = f"{run.stage_directory('target')}/model"
    command = ["calibrate", "--target", target, "--reference", target, "--task", "sudoku", "--data", "synthetic"]
    assert cli.main(command) == 2
    assert "--target" in capsys.readouterr().err


def test_weights_that_changed_are_not_copied(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of an older release have their digest in the manifest only. The copy gets a list of its own."""
    [file] = Path(run.stage_directory("target")).glob("model/*.safetensors")
    (file.parent / checksums.FILE).unlink(missing_ok=True)
    run.replace_summary("target", {"weights_sha256": storage.sha256(str(file))})
    assert cli.main(["export", run.path, "--output", str(tmp_path / "good")]) == 0
    assert storage.sha256(str(file)) in (tmp_path / "good" / checksums.FILE).read_text()
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)
    capsys.readouterr()
    assert cli.main(["export", run.path, "--output", str(tmp_path / "bad")]) == 2
    error = capsys.readouterr().err
    assert "--redo target" in error and "--no-verify" in error and not (tmp_path / "bad").exists()
    assert cli.main(["export", run.path, "--output", str(tmp_path / "bad"), "--no-verify"]) == 0
