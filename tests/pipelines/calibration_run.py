"""Tiny models and a finished calibration, for the tests of the stage, the command and the page."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from pipelines.calibration.job import CalibrationJob, calibrate_model, synthetic_problems
from rcd_core import DecodeSettings, new_model
from rcd_core.families.base import CheckpointInfo
from rcd_core.families.config import ModelConfig
from rcd_core.text.tokenizer import load_tokenizer, mask_token_id, stop_token_ids, train_tokenizer

SIZES: dict[str, Any] = {
    "family": "sdar", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32,
}  # fmt: skip
TRAIN = {"steps": 1, "batch_size": 1}
NUM = 6


def save_models(directory: Path) -> None:
    """Untrained models in <directory>/target, baseline and reference. The target's predictions are the sharper ones."""
    tokenizer = train_tokenizer(["#123456", "#654321"], 270)
    tokenizer.save_pretrained(directory / "tokenizer")
    tokenizer = load_tokenizer(directory / "tokenizer")
    for seed, name in enumerate(("target", "baseline", "reference")):
        rcd = {"alpha": "normalized_entropy", "start": "zero"} if name == "target" else {}
        ids = mask_token_id(tokenizer), stop_token_ids(tokenizer), tokenizer.pad_token_id
        model = new_model(
            ModelConfig(**SIZES), vocab_size=len(tokenizer), info=CheckpointInfo(*ids, 37, rcd), seed=seed
        )
        for parameter in model.parameters():
            parameter.data *= 1.5 if name == "reference" else 2.0
        model.save_pretrained(directory / name, tokenizer)


def run_job(models: Path, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "stage": "target",
        "checkpoint": str(models / "target"),
        "reference": str(models / "reference"),
        "calibrated": True,
        "tokenizer": str(models / "tokenizer"),
        "task": "sudoku",
        "num_examples": NUM,
        "decode": DecodeSettings(policy="low_confidence_static", denoising_steps=6),
        "max_length": 37,
    }
    return calibrate_model(CalibrationJob(**{**fields, **changes}), list(islice(synthetic_problems("sudoku", 0), NUM)))
