"""What a user mistypes gets one message that names what was typed: the flag, not the recipe's key behind it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli.main import main
from pipelines.recipe.load import load_recipe
from pipelines.run.directory import RunDirectory
from rcd_core import UserError, load_model
from rcd_core.io import storage

GOLDEN = Path(__file__).parents[2] / "golden"
TINY = str(GOLDEN / "sdar_tiny")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def evaluate(capsys: pytest.CaptureFixture[str], output: Path, *words: str, task: str = "sudoku") -> str:
    return refused(capsys, "evaluate", "--baseline", TINY, "--task", task, "--output", str(output), "--dry_run", *words)


def test_rcd_runs_takes_a_relative_directory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"--storage {tmp_path}/rel does not exist" in refused(capsys, "runs", "--storage", "rel")
    (tmp_path / "rel").mkdir()
    assert main(["runs", "--storage", "rel"]) == 0
    (tmp_path / "rel" / "recipe.yaml").touch()
    assert f"--storage {tmp_path}/rel is a run" in refused(capsys, "runs", "--storage", "rel")


def test_problems_that_are_not_there_or_have_no_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--test: absent.jsonl does not exist in" in evaluate(capsys, tmp_path / "o", "--test", "absent.jsonl")
    assert "--num_examples" in evaluate(capsys, tmp_path / "o", "--test", "synthetic")
    url = ("evaluate", "--url", "http://127.0.0.1:1/v1", "--model", "m", "--task", "sudoku", "--output", str(tmp_path))
    assert "--test: absent.jsonl" in refused(capsys, *url, "--test", "absent.jsonl")
    none = evaluate(capsys, tmp_path / "o", "--test", "synthetic", "--num_examples", "0")
    assert "--num_examples is 0" in none and "data." not in none


def test_the_flag_is_named_and_not_what_it_becomes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ("--model", "m", "--task", "sudoku", "--test", "synthetic", "--num_examples", "4")
    said = refused(capsys, "evaluate", "--url", "foo", *words, "--output", str(tmp_path / "o"))
    assert "--url is 'foo'" in said and len(said.splitlines()) == 1
    assert f"RUN {tmp_path}/no is no run" in refused(
        capsys, "export", f"{tmp_path}/no", "--output", str(tmp_path / "new")
    )
    (tmp_path / "odd.jsonl").write_text('{"ask": "1 + 1?", "answer": "2"}\n')
    assert "--field question=COLUMN" in refused(capsys, "data", "inspect", str(tmp_path / "odd.jsonl"), "--task", "qa")
    assert "data." not in refused(capsys, "data", "inspect", str(tmp_path / "absent.jsonl"))


def test_answers_that_leave_no_room_for_a_prompt(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Known from config.json, before Ray starts."""
    test = tmp_path / "test.jsonl"
    test.write_text('{"question": "1 + 1?", "answer": "#### 2"}')
    arguments = ("--test", str(test), "--settings", "paper-sdar-b64")
    error = evaluate(capsys, tmp_path / "o", *arguments, task="gsm8k")
    assert "max_new_tokens is 16384 (of paper-sdar-b64)" in error and "--set decode.max_new_tokens=" in error


def test_results_of_other_settings_are_kept_by_another_output(
    capsys: pytest.CaptureFixture[str], tiny_models: Path, tmp_path: Path
) -> None:
    run = RunDirectory(str(tmp_path / "out"))
    material: dict[str, Any] = {"recipe": {"data.num_test": 9}, "outside": {}, "inputs": {}, "schema": 2}
    run.begin("prepare", material)
    run.finish("prepare", material, {}, datetime.now().astimezone(), 0.0)
    model = str(tiny_models / "target")
    error = evaluate(capsys, tmp_path / "out", "--test", "synthetic", "--num_examples", "4", "--baseline", model)
    assert "data.num_test: 9 there, 4 now" in error and "another --output" in error and "name=NAME" not in error
    assert "evaluate" in error and "deploy" not in error, "no stage of this command"


def test_a_target_of_its_own_predictions_has_no_reference_to_match(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = load_model(GOLDEN / "rcd" / "sdar_ref_tiny")
    model.info.rcd = {"source": "self", "alpha": "normalized_entropy"}
    model.save_pretrained(tmp_path / "model")
    arguments = ("--task", "sudoku", "--data", "synthetic", "--reference", TINY)
    error = refused(capsys, "calibrate", "--target", str(tmp_path / "model"), *arguments)
    assert "rcd.source 'self'" in error and "--reference" in error
    assert not (tmp_path / "model" / "rcd_calibration.json").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ('name="a b"', r"name is 'a b'.*letters, digits and \. _ -"),
        ('variants={"a b": {}}', "variants: the name is 'a b'.*letters, digits and _"),
        ('deploy.models={"/x": {checkpoint: /m}}', "deploy.models: the name is '/x'.*letters"),
        ("deploy.cors_origins=[chat]", r"deploy.cors_origins.0 is 'chat'.*https://"),
    ],
)
def test_names_are_described_in_words(change: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        load_recipe("sudoku-reference", [change])
    assert "pattern" not in str(error.value) and "^" not in str(error.value)


def test_a_storage_that_is_away_is_not_called_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(path: str) -> bytes:
        raise UserError("s3://bucket is not reachable from here")

    monkeypatch.setattr(storage, "read_bytes", away)
    with pytest.raises(UserError, match="^s3://bucket is not reachable from here$"):
        storage.read_json("s3://bucket/demo/prepare/manifest.json")


def test_a_client_does_not_state_defaults_that_the_server_decides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--help"]) == 0
    assert "0.85" not in capsys.readouterr().out
    assert main(["generate", "--help"]) == 0
    assert "0.85" in capsys.readouterr().out
