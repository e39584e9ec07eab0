"""What stops stage prepare with one message: before the job, in the driver, or from a worker on another node."""

from __future__ import annotations

import io
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from pipelines import prepare
from pipelines.recipe.load import parse_recipe
from pipelines.run.directory import RunDirectory, StageContext
from pipelines.run.driver import main
from pipelines.run.messages import user_message
from rcd_core.errors import UserError
from rcd_core.text.tokenizer import train_tokenizer
from tests.pipelines.calibration_run import SIZES, TRAIN


def recipe_of(directory: Path, **data: Any) -> dict[str, Any]:
    return {
        "name": "run",
        "storage": str(directory),
        "block_length": 8,
        "data": {"task": "qa", **data},
        "base": {"start": SIZES, "train": TRAIN},
        "reference": {"start": SIZES, "train": TRAIN},
        "target": {"train": TRAIN},
    }


def rows(path: Path, **columns: str) -> str:
    path.write_text(json.dumps(columns) + "\n")
    return str(path)


def context(raw: dict[str, Any]) -> StageContext:
    recipe = parse_recipe(raw)
    console = Console(file=io.StringIO(), width=200)
    run = RunDirectory(recipe.run_directory)
    return StageContext(recipe=recipe, run=run, stage="prepare", key="", inputs=(), console=console)


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_missing_column_is_found_before_the_job(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = rows(tmp_path / "a.jsonl", question="q", reply="a")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(tmp_path, train=file, test=file)))
    assert main(["--recipe", str(recipe), *more]) == 2
    error = capsys.readouterr().err
    assert "'answer'" in error and "reply" in error and "data.fields.answer" in error
    renamed = ["--set", "data.fields={answer: reply}", "--dry-run"]
    assert main(["--recipe", str(recipe), *renamed]) == 0


def test_data_sets_on_a_hub_that_does_not_answer_do_not_stop_a_dry_run(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(tmp_path, train="hf://o/name", test="hf://o/name")))
    assert main(["--recipe", str(recipe), "--dry-run"]) == 0


def test_data_that_only_the_driver_can_read_is_one_message(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is gone when the worker looks for it, as on a node without it."""
    train_tokenizer(["a"], 300).save_pretrained(tmp_path / "tokenizer")
    gone = str(tmp_path / "gone.jsonl")
    raw = recipe_of(tmp_path, train=gone, test=gone) | {"tokenizer": {"path": str(tmp_path / "tokenizer")}}
    monkeypatch.setattr(prepare, "check_sources", lambda recipe: None)
    with pytest.raises(Exception) as error:
        prepare.run(context(raw))
    message = user_message(error.value)
    assert message and gone in message and platform.node() in message and "\n" not in message


def test_a_chat_template_with_a_fault_is_one_message_in_the_driver(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a"], 300)
    tokenizer.chat_template = "{% for message in messages %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = rows(tmp_path / "a.jsonl", question="q", answer="a")
    raw = recipe_of(tmp_path, train=file, test=file) | {"tokenizer": {"path": str(tmp_path / "tokenizer")}}
    with pytest.raises(UserError, match="chat template"):  # without Ray
        prepare.run(context(raw))
