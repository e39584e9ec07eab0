"""T_res of a pair of checkpoints, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.calibration.job import store
from rcd_core import DecodeSettings, UserError, load_model
from rcd_core.io import storage
from tests.pipelines.calibration_run import NUM, run_job


def test_the_smallest_distance_wins_and_all_figures_are_there(calibration: dict[str, Any]) -> None:
    trials = calibration["trials"]
    best = min(trials, key=lambda trial: trial["distance"])
    assert (
        calibration["residual_temperature"] == best["residual_temperature"]
        and calibration["distance"] == best["distance"]
    )
    at_one = next(trial for trial in trials if trial["residual_temperature"] == 1.0)
    assert calibration["distance_uncalibrated"] == at_one["distance"] > best["distance"]
    assert all(trial["distance"] == trial["distance_decoding"] != trial["distance_training"] for trial in trials)
    assert all(trial["num_problems"] == NUM and 0 <= trial["accuracy_low"] <= trial["accuracy"] for trial in trials)
    for side in ("reference", "training", "before", "after"):
        assert sum(calibration["alphas"]["histograms"][side]) == pytest.approx(1.0, abs=1e-4)
    assert calibration["agreement"]["overall"]["positions"] > 100 and sum(calibration["staleness"]["positions"]) > 100
    assert calibration["discarded"]["overall"]["1"] < calibration["discarded"]["overall"]["20"]


def test_it_is_a_pure_function_and_depends_on_the_match(tiny_models: Path, calibration: dict[str, Any]) -> None:
    other = run_job(tiny_models, match="training")
    assert run_job(tiny_models)["trials"] == calibration["trials"]
    by_training = {t["residual_temperature"]: t["distance"] for t in other["trials"]}
    assert by_training[1.0] == next(
        t["distance_training"] for t in calibration["trials"] if t["residual_temperature"] == 1.0
    )
    assert other["match"] == "training" and min(by_training.values()) == other["distance"]


def test_alpha_of_the_reference_itself_matches_at_one(tiny_models: Path) -> None:
    """A target that is its own reference, with nearly no residuals: T_res 1, distance 0."""
    itself = run_job(
        tiny_models,
        reference=str(tiny_models / "target"),
        decode=DecodeSettings(alpha="calibrated_entropy", alpha_scale=1e6),
    )
    assert itself["residual_temperature"] == 1.0 and itself["distance"] < 1e-9


def test_without_anything_to_match_t_res_is_one(tiny_models: Path) -> None:
    alone = run_job(tiny_models, reference=None)
    assert alone["residual_temperature"] == 1.0 and "without a reference" in alone["nothing_to_match"]
    assert len(alone["trials"]) == 1 and "agreement" not in alone and "staleness" in alone
    fixed = run_job(
        tiny_models, decode=DecodeSettings(alpha="fixed", policy="low_confidence_static", denoising_steps=6)
    )
    assert fixed["residual_temperature"] == 1.0 and "no temperature changes" in fixed["nothing_to_match"]


def test_a_reference_of_another_vocabulary_is_refused(tiny_models: Path) -> None:
    golden = Path(__file__).parents[2] / "golden" / "sdar_tiny"
    with pytest.raises(UserError, match="vocab_size"):
        run_job(tiny_models, reference=str(golden))


def test_decoding_finds_a_stored_temperature_at_a_uri(
    tiny_models: Path, calibration: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RCD_CACHE", str(tmp_path))
    uri = f"mock://{tmp_path.name}/model"
    storage.upload_dir(tiny_models / "target", uri)
    assert "calibration" not in load_model(uri).info.rcd
    store(uri, calibration)
    rcd = load_model(uri).info.rcd
    assert rcd["residual_temperature"] == calibration["residual_temperature"] != 1.0
    assert rcd["calibration"]["match"] == "decoding" and "trials" not in rcd["calibration"]
