"""`rcd fit`: from sizes alone, and in agreement with what the engine plans for a loaded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.cli import main as cli
from pipelines.cli.fit import MOST_REQUESTS, most_requests, most_rows, read_released
from rcd_core import load_model
from rcd_core.decoding.memory import fit as plan
from rcd_core.errors import UserError
from rcd_core.training.settings import TrainSettings

GOLDEN = Path(__file__).parents[2] / "golden"
SDAR8 = "JetLM/SDAR-8B-Chat"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipelines.cli.fit.cached_snapshot", lambda name, revision: None)


def test_a_request_takes_what_its_keys_and_values_take() -> None:
    """SDAR-8B in bf16: 36 layers, 8 key/value heads of 128."""
    found = read_released(SDAR8)
    weights, each = 2 * found.shape.parameters, 4096 * 2 * 36 * 8 * 128 * 2
    assert 8.1e9 < found.shape.parameters < 8.3e9
    counts = [most_requests(found, usable, torch.bfloat16, 4096, 32, 1, True) for usable in (72e9, 72e9 + 10 * each)]
    assert counts[0] and counts[1] and 9 <= counts[1] - counts[0] <= 11
    assert counts[0] * each < 72e9 - weights < 1.3 * counts[0] * each
    assert most_requests(found, 16e9, torch.bfloat16, 1024, 32, 1, True) == 0, "the weights alone do not fit"
    split = most_requests(found, 72e9, torch.bfloat16, 4096, 32, 2, True)
    assert split and split > 2 * counts[0]
    assert most_requests(found, 72e9, torch.bfloat16, 1 << 20, 32, 1, True) is None


def test_it_agrees_with_the_engines_own_plan() -> None:
    model, found = load_model(GOLDEN / "sdar_tiny"), read_released(str(GOLDEN / "sdar_tiny"))
    weights = found.shape.parameters * 4
    for free in (3_000_000, 9_000_000):
        mine = most_requests(found, free + weights, torch.float32, 256, 4, 1, False)
        try:
            assert mine == plan(model, 256, 4, MOST_REQUESTS, free=free).max_batch
        except UserError:
            assert mine == 0


def test_more_gpus_and_less_memory_per_row_hold_more_rows() -> None:
    shape = read_released(SDAR8).shape
    sharded = TrainSettings(steps=1, batch_size=8, dtype="bfloat16", strategy="fsdp2", activation_checkpointing=True)
    rows = [most_rows(shape, sharded, 80e9, gpus, 4096) for gpus in (2, 8)]
    assert 0 <= rows[0] < rows[1]
    assert most_rows(shape, sharded, 80e9, 8, 2048) >= 2 * rows[1]
    assert most_rows(shape, TrainSettings(steps=1, batch_size=8), 80e9, 8, 4096) == 0, "ddp holds it whole"


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", SDAR8, "--device", "H100", "--gpus", "8"]) == 0
    said = capsys.readouterr().out
    assert "8,190,735,360 parameters" in said and "fsdp2" in said and "does not fit" in said
    assert cli.main(["fit", str(GOLDEN / "llada_tiny")]) == 0
    assert "CPU" in capsys.readouterr().out or torch.cuda.is_available()
    assert cli.main(["fit", "nobody/nothing"]) == 2
    assert "hf download nobody/nothing config.json" in capsys.readouterr().err
    assert cli.main(["fit", SDAR8, "--gpus", "0"]) == 2
    assert "--gpus" in capsys.readouterr().err
