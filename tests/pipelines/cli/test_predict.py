"""`rcd predict` on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main as cli
from pipelines.cli.calibrate import read_problems
from rcd_core import DecodeSettings, load_model
from rcd_core.calibration.information import measure
from rcd_core.calibration.measured import GAIN, MEASURED, NO_GAIN, outlook
from rcd_core.tasks import get_task
from rcd_core.text.encoding import Encoder
from rcd_core.text.tokenizer import load_tokenizer

NUM = 6


def command(model: Path, *more: str) -> list[str]:
    return ["predict", "--baseline", str(model), "--task", "sudoku", "--num_examples", str(NUM), *more]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_it_measures_plain_decoding_of_the_first_prompts(tiny_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(tiny_models / "baseline")
    problems = read_problems("sudoku", "synthetic", (), "--test")
    encoder = Encoder(get_task("sudoku"), load_tokenizer(tiny_models / "baseline"), 37, 64)
    canvases = [encoder.test(next(problems)).prompt_ids for _ in range(NUM)]
    expected = measure(model, canvases, DecodeSettings(confidence_threshold=0.9), infill=True)
    found = printed(capsys, *command(tiny_models / "baseline", "--test", "synthetic"))
    assert found == pytest.approx({"prompts": NUM, **expected}, rel=1e-6, abs=1e-9)
    assert found["information_per_token"] == pytest.approx(found["information"] * found["discarded"])


def test_nothing_thrown_away_is_no_gain(tiny_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a threshold of 0 a pass commits every position."""
    assert cli.main(command(tiny_models / "baseline", "--test", "synthetic", "--confidence_threshold", "0")) == 0
    shown = capsys.readouterr().out
    assert "both: 0.000. No gain is to be expected" in " ".join(shown.split())


def test_between_the_values_that_were_measured_nothing_is_claimed() -> None:
    assert 0 < NO_GAIN < GAIN
    assert "No gain" in outlook(NO_GAIN) and "likely" in outlook(GAIN)
    assert outlook((NO_GAIN + GAIN) / 2).startswith("Not known")


def test_the_measure_orders_the_models_that_were_measured() -> None:
    """Else it would have to be dropped: every model that gained has more of it than every one that did not."""
    gained = [m.both[0] for m in MEASURED if m.gain[0] > 1.05]
    assert max(m.both[1] for m in MEASURED if m.gain[0] <= 1.05) < min(gained) and len(gained) < len(MEASURED)


def test_a_file_and_its_columns(tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [get_task("sudoku").synthetic(i, "test", 0) for i in range(NUM + 2)]
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps({"puzzle": r["question"], "answer": r["answer"]}) + "\n" for r in rows))
    named = command(tiny_models / "baseline", "--test", str(file), "--field", "question=puzzle")
    assert printed(capsys, *named)["predictions"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--test", "synthetic", "--residual"], "--residual is on"),
        (["--test", "synthetic", "--num_examples", "0"], "--num_examples is 0"),
        (["--test", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--test", "synthetic", "--task", "sudoko"], "sudoko"),
        (["--test", str(Path(__file__).parent / "x.jsonl"), "--field", "what=ever"], "--field what=ever"),
    ],
)
def test_refused_flags(tiny_models: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(tiny_models / "baseline", *more)) == 2
    assert message in capsys.readouterr().err
