"""What a training takes over from the checkpoint that it starts from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.training.job import make_job
from pipelines.training.worker import start_model
from rcd_core.decode_settings import DecodeSettings
from rcd_core.decoding.request import uncalibrated
from rcd_core.families.files import CALIBRATION_FILE
from tests.pipelines.training_run import context, make_recipe
from tests.rcd_core.checkpoints import checkpoint, edit_config


@pytest.fixture
def calibrated(tmp_path: Path) -> Path:
    directory = checkpoint(tmp_path / "calibrated")
    edit_config(directory, rcd={"alpha": "normalized_entropy", "residual_temperature": 1.0, "start": "zero"})
    (directory / CALIBRATION_FILE).write_text('{"schema_version": 1, "residual_temperature": 0.7}')
    return directory


@pytest.mark.parametrize("source", ["none", "self"])
def test_new_weights_do_not_keep_the_temperature_of_the_start(source: str, calibrated: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "run", target={"start": str(calibrated), "residual": {"source": source}})
    rcd = start_model(make_job(context(recipe))).info.rcd
    assert "calibration" not in rcd and rcd.get("residual_temperature") in (None, 1.0) and rcd["start"] == "zero"


def test_a_model_trained_on_its_own_predictions_needs_no_calibration(calibrated: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "run", target={"start": str(calibrated)})
    model = start_model(make_job(context(recipe)))
    on = DecodeSettings(residual=True)
    assert model.info.rcd["source"] == "self" and uncalibrated(on, model) is None
    model.info.rcd["source"] = "signals"
    assert uncalibrated(on, model)
