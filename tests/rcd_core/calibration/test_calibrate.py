"""T_res: the distance against closed forms, the search, the stored file and its use in decoding."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcd_core import Decoder, DecodeSettings, UserError, load_model
from rcd_core.calibration.distance import (
    MIN_POSITIONS,
    Alphas,
    alpha_distance,
    best_temperature,
    search_temperature,
    share_bins,
    wasserstein,
)
from rcd_core.calibration.training_alphas import training_shares
from rcd_core.decoding.request import resolve_settings, uncalibrated
from rcd_core.families.files import CALIBRATION_FILE
from rcd_core.training.data.rows import TrainingRow
from tests.rcd_core.checkpoints import checkpoint, edit_config


def test_wasserstein_of_simple_samples() -> None:
    a = np.random.default_rng(0).random(50)
    assert wasserstein(a, a) == 0.0
    assert wasserstein(a, a + 0.25) == pytest.approx(0.25)
    assert wasserstein(np.array([0.0, 1.0]), np.array([0.5])) == pytest.approx(0.5), "different sizes"
    assert wasserstein(np.array([0.0, 0.0, 0.0, 1.0]), np.array([0.0])) == pytest.approx(0.25)
    assert wasserstein(a, np.repeat(a, 3)) == pytest.approx(0.0)
    assert wasserstein(np.zeros(9), np.ones(4)) == 1.0


def test_shares_fall_into_tenths() -> None:
    assert share_bins(np.array([1 / 37, 0.1, 0.11, 0.3, 0.95, 1.0])).tolist() == [0, 0, 1, 2, 9, 9]


def test_distance_is_within_bins_and_weighted() -> None:
    """Two swapped bins: equal alphas overall, different in every bin."""
    n = MIN_POSITIONS
    low, high = np.full(n, 0.2), np.full(n, 0.8)
    shares = np.repeat([0.25, 0.95], n)
    own, other = Alphas(np.r_[low, high], shares), Alphas(np.r_[high, low], shares)
    assert alpha_distance(other, own, own.counts) == pytest.approx(0.6)
    near = Alphas(np.r_[low + 0.1, low], shares)
    weights = np.zeros(10)
    weights[[2, 9]] = 3.0, 1.0
    assert alpha_distance(near, own, weights) == pytest.approx((3 * 0.1 + 0.6) / 4)


def test_bins_with_few_positions_do_not_count() -> None:
    n = MIN_POSITIONS
    own = Alphas(np.r_[np.full(n, 0.5), 0.9], np.r_[np.full(n, 0.25), 0.95])
    other = Alphas(np.r_[np.full(n, 0.4), np.full(n, 0.1)], np.r_[np.full(n, 0.25), np.full(n, 0.95)])
    assert alpha_distance(other, own, own.counts) == pytest.approx(0.1)
    with pytest.raises(UserError, match="num_examples"):
        alpha_distance(other, Alphas(own.alpha[n:], own.masked_share[n:]), own.counts)


@pytest.mark.parametrize("best", [0.1, 0.37, 1.0, 1.3, 3.9, 9.0])
def test_the_search_finds_the_best_temperature(best: float) -> None:
    evaluated: list[float] = []

    def distance(t: float) -> float:
        evaluated.append(t)
        return abs(math.log(t / best))

    curve = search_temperature(distance)
    assert abs(math.log(best_temperature(curve) / best)) <= math.log(2) / 16 + 1e-4, "within half a step of 1/8 octave"
    assert len(evaluated) == len(set(evaluated)) == len(curve) < 25 and 1.0 in evaluated
    assert [t for t, _ in curve] == sorted(t for t, _ in curve)


def test_the_search_is_bounded() -> None:
    assert 16.0 <= best_temperature(search_temperature(lambda t: -t)) < 32.0
    assert best_temperature(search_temperature(lambda _: 0.5)) == 1.0, "ties: stay at 1"


def test_masking_ratio_of_training_rows() -> None:
    labels = np.array([-100, 1, 1, 1, 1, 1, 1, -100])
    masked = np.array([0, 1, 0, 0, 1, 1, 1, 0], dtype=bool)
    row = TrainingRow(0, "x", 0, labels, labels, masked, np.ones(8))
    assert training_shares(row, 4).tolist() == pytest.approx([1 / 3, 1, 1, 1])
    assert training_shares(row, None).tolist() == pytest.approx([4 / 6] * 4)


# -- with the checkpoint


def calibrated(directory: Path, **content: Any) -> Path:
    checkpoint(directory)
    edit_config(directory, rcd={"alpha": "normalized_entropy", "residual_temperature": 1.0})
    stored = {"schema_version": 1, "residual_temperature": 0.7, "distance": 0.02, **content}
    (directory / CALIBRATION_FILE).write_text(json.dumps(stored))
    return directory


def test_decoding_uses_the_stored_temperature(tmp_path: Path) -> None:
    model = load_model(calibrated(tmp_path))
    assert model.info.rcd["residual_temperature"] == 0.7 and model.info.rcd["calibration"]["distance"] == 0.02
    on = DecodeSettings(residual=True, start="zero")
    assert resolve_settings(on, model, False).residual_temperature == 0.7
    given = DecodeSettings(residual=True, start="zero", residual_temperature=1.2)
    assert resolve_settings(given, model, False).residual_temperature == 1.2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Decoder(model).generate([[5]], DecodeSettings(residual=True, start="zero", max_new_tokens=2))


def test_other_weights_do_not_inherit_the_stored_temperature(tmp_path: Path) -> None:
    directory = calibrated(tmp_path / "a")
    checkpoint(tmp_path / "b")
    load_model(tmp_path / "b").save_pretrained(directory)
    assert "calibration" not in load_model(directory).info.rcd
    saved = load_model(calibrated(tmp_path / "c"))  # a copy of the same weights keeps it
    saved.save_pretrained(tmp_path / "d")
    assert load_model(tmp_path / "d").info.rcd["residual_temperature"] == 0.7


@pytest.mark.parametrize("wrong", [{"residual_temperature": 0}, {"residual_temperature": "1"}, {"schema_version": 9}])
def test_a_broken_calibration_is_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{CALIBRATION_FILE}: {next(iter(wrong))}"):
        load_model(calibrated(tmp_path, **wrong))


def test_an_uncalibrated_checkpoint_warns(tmp_path: Path) -> None:
    directory = calibrated(tmp_path)
    (directory / CALIBRATION_FILE).unlink()
    model = load_model(directory)
    on = DecodeSettings(residual=True, start="zero", max_new_tokens=2)
    with pytest.warns(UserWarning, match="rcd calibrate"):
        Decoder(model).generate([[5]], on)
    quiet = [
        DecodeSettings(max_new_tokens=2),
        DecodeSettings(residual=True, residual_temperature=1.0),
        DecodeSettings(residual=True, residual_source="reference"),
        DecodeSettings(residual=True, alpha="fixed"),
    ]
    assert uncalibrated(on, model) and not any(uncalibrated(settings, model) for settings in quiet)
    model.info.rcd["residual_temperature"] = 0.92  # chosen by hand
    assert uncalibrated(on, model) is None
