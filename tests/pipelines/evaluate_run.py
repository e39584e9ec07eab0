"""A finished run of untrained models, ready to be evaluated, and readers of its results."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipelines import evaluate, prepare
from pipelines.recipe.load import parse_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.directory import RunDirectory, StageContext
from rcd_core import new_model
from rcd_core.families.base import CheckpointInfo
from rcd_core.families.config import ModelConfig
from rcd_core.families.files import CALIBRATION_FILE
from rcd_core.text.tokenizer import load_tokenizer, mask_token_id, stop_token_ids
from tests.pipelines.calibration_run import SIZES, TRAIN

SMALLER = {**SIZES, "hidden_size": 8, "intermediate_size": 16}
STAGES = ("baseline", "target", "target-paper", "reference")


def make_recipe(directory: Path, **sections: Any) -> Recipe:
    raw: dict[str, Any] = {
        "name": "run",
        "storage": str(directory),
        "block_length": 37,
        "tokenizer": {"vocab_size": 270},
        "data": {"task": "sudoku", "train": "synthetic", "test": "synthetic", "num_train": 4, "num_test": 12},
        "base": {"start": SIZES, "train": TRAIN},
        "reference": {"start": SMALLER, "train": TRAIN},
        "target": {"train": TRAIN},
        "variants": {"paper": {"dropout": 0.0}},
        "evaluate": {"thresholds": [0.02, 0.9], "batch_size": 5},
        "resources": {"evaluate_actors": 2},
    }
    return parse_recipe({**raw, **sections})


def stage_context(recipe: Recipe, stage: str, inputs: tuple[str, ...] = ()) -> StageContext:
    console = Console(file=io.StringIO(), width=200)
    run = RunDirectory(recipe.run_directory)
    return StageContext(recipe=recipe, run=run, stage=stage, key="", inputs=inputs, console=console)


@pytest.fixture(scope="module")
def make_run(ray_cluster: str) -> Callable[[Recipe], StageContext]:
    """make_run(recipe): runs prepare and saves untrained models -> the context of evaluate."""

    def make(recipe: Recipe) -> StageContext:
        ctx = stage_context(recipe, "prepare")
        _finish(ctx, "prepare", prepare.run(ctx))
        tokenizer = load_tokenizer(f"{ctx.directory}/tokenizer")
        for seed, stage in enumerate(STAGES):
            start = ModelConfig(**(SMALLER if stage == "reference" else SIZES))
            rcd = {} if stage in ("baseline", "reference") else {"alpha": "normalized_entropy", "start": "zero"}
            info = CheckpointInfo(
                mask_token_id(tokenizer), stop_token_ids(tokenizer), tokenizer.pad_token_id, recipe.block_length, rcd
            )
            model = new_model(start, vocab_size=len(tokenizer), info=info, seed=seed)
            for parameter in model.parameters():  # some confidences must exceed the thresholds
                parameter.data *= 3.0
            directory = Path(recipe.run_directory) / stage / "model"
            model.save_pretrained(directory, tokenizer)
            if rcd:  # older releases stored T_res there; without a stage calibrate it is 1
                (directory / CALIBRATION_FILE).write_text('{"schema_version": 1, "residual_temperature": 9}')
            _finish(ctx, stage, {})
        return stage_context(recipe, "evaluate", ("prepare", *STAGES))

    def _finish(ctx: StageContext, stage: str, summary: dict[str, Any]) -> None:
        ctx.run.finish(stage, {"stage": stage}, summary, datetime.now().astimezone(), 0.0)

    return make


@pytest.fixture(scope="module")
def sudoku(make_run: Callable[[Recipe], StageContext], tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    ctx = make_run(make_recipe(tmp_path_factory.mktemp("sudoku")))
    evaluate.run(ctx)
    return ctx


def results(ctx: StageContext) -> dict[str, Any]:
    return json.loads((Path(ctx.directory) / "results.json").read_text())  # type: ignore[no-any-return]


def rows(ctx: StageContext) -> list[dict[str, Any]]:
    return pq.read_table(f"{ctx.directory}/results.parquet").to_pylist()  # type: ignore[no-any-return]


def num_decoded(ctx: StageContext) -> int:
    """Answers on disk while the evaluation runs."""
    return sum(pq.read_metadata(path).num_rows for path in Path(ctx.directory).glob("parts/*.parquet"))


def timeless(ctx: StageContext) -> list[dict[str, Any]]:
    """The columns that a rerun must repeat."""
    return [{**row, "seconds": None} for row in rows(ctx)]
