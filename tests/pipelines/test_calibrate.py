"""The stage `calibrate` on real Ray, and its inputs."""

from __future__ import annotations

import io
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipelines import calibrate
from pipelines.calibration.inputs import held_out_problems
from pipelines.recipe.load import parse_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.directory import RunDirectory, StageContext
from pipelines.run.stages import stages_of
from rcd_core import UserError
from rcd_core.families.files import CALIBRATION_FILE
from rcd_core.io import storage
from rcd_core.tasks import get_task
from rcd_core.text.encoding import content_id
from tests.pipelines.calibration_run import NUM, SIZES, TRAIN


def make_recipe(directory: Path, **sections: Any) -> Recipe:
    raw: dict[str, Any] = {
        "name": "run",
        "storage": str(directory),
        "block_length": 37,
        "tokenizer": {"vocab_size": 270},
        "data": {"task": "sudoku", "train": "synthetic", "test": "synthetic", "num_train": 4, "num_test": 4},
        "base": {"start": SIZES, "train": TRAIN},
        "reference": {"start": SIZES, "train": TRAIN},
        "target": {"train": TRAIN},
        "calibrate": {"num_examples": NUM, "decode": {"policy": "low_confidence_static", "denoising_steps": 6}},
    }
    return parse_recipe({**raw, **sections})


def context(recipe: Recipe, tiny_models: Path) -> StageContext:
    """The stage's, with the tiny_models in place of trained ones."""
    run = RunDirectory(recipe.run_directory)
    inputs = stages_of(recipe)["calibrate"].inputs
    for name in inputs:
        if name != "prepare":
            storage.upload_dir(tiny_models / name, storage.join(run.stage_directory(name), "model"))
        run.finish(name, {"stage": name}, {"validation": []}, datetime.now().astimezone(), 0.0)
    storage.upload_dir(tiny_models / "tokenizer", storage.join(run.stage_directory("prepare"), "tokenizer"))
    console = Console(file=io.StringIO(), width=200)
    return StageContext(recipe=recipe, run=run, stage="calibrate", key="", inputs=inputs, console=console)


def test_the_stage_calibrates_every_target_and_changes_no_model(
    ray_cluster: str, tiny_models: Path, tmp_path: Path
) -> None:
    ctx = context(make_recipe(tmp_path), tiny_models)
    assert ctx.inputs == ("prepare", "target", "baseline", "reference")
    summary = calibrate.run(ctx)
    results = storage.read_json(storage.join(ctx.directory, "calibration.json"))
    assert list(results) == ["target", "baseline"] and list(results["baseline"]) == ["discarded"]
    temperature = results["target"]["residual_temperature"]
    assert summary["fingerprint"] == summary["residual_temperatures"] == {"target": temperature}
    assert not any((Path(ctx.checkpoint(stage)) / CALIBRATION_FILE).exists() for stage in ("target", "baseline"))
    calibrate.report(ctx)
    printed = ctx.console.file.getvalue()  # type: ignore[attr-defined]
    assert f"target: T_res {temperature:g}" in printed and "report.html" in printed
    assert "T_res" in (Path(ctx.directory) / "report.html").read_text()


def test_held_out_problems_are_those_that_prepare_held_out(tiny_models: Path, tmp_path: Path) -> None:
    rows = [get_task("sudoku").synthetic(i, "train", 0) for i in range(9)]
    ids = sorted(content_id(get_task("sudoku").problem(row)) for row in rows)
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0], {"question": "?", "answer": "?"}]))
    source = {"task": "sudoku", "train": str(data), "test": str(data), "num_validation": 4}
    recipe = make_recipe(tmp_path, data=source)
    ctx = context(recipe, tiny_models)
    validation = Path(ctx.run.stage_directory("prepare")) / "validation"
    validation.mkdir()
    pq.write_table(pa.table({"example_id": ids[:4]}), validation / "part-00000.parquet")
    manifest = {"validation": ["part-00000.parquet"]}
    ctx.run.finish("prepare", {"stage": "prepare"}, manifest, datetime.now().astimezone(), 0.0)
    assert [content_id(problem) for problem in held_out_problems(ctx, 3)] == ids[:3]
    assert len(held_out_problems(ctx, 100)) == 4


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"data": {"task": "sudoku", "train": "/x.jsonl", "test": "/x.jsonl"}}, "data.num_validation"),
        ({"calibrate": {"decode": {"residual_temperature": 0.9}}}, "residual_temperature"),
        ({"calibrate": {"decode": {"residual_source": "reference"}}}, "residual_source"),
    ],
)
def test_recipes_that_cannot_be_calibrated(tmp_path: Path, sections: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        make_recipe(tmp_path, **sections)
