"""T_res of evaluate and deploy: from the manifest of the stage calibrate, never from a file next to a model."""

from __future__ import annotations

import io
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines import evaluate
from pipelines.recipe.load import parse_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.directory import RunDirectory, StageContext
from pipelines.run.stages import stages_of
from pipelines.serving.description import describe
from tests.pipelines.calibration_run import SIZES, TRAIN

TRAINED = {"base": {"start": SIZES, "train": TRAIN}, "target": {"train": TRAIN}}


def make_recipe(directory: Path, **sections: Any) -> Recipe:
    raw: dict[str, Any] = {
        "name": "run",
        "storage": str(directory),
        "block_length": 37,
        "data": {"task": "sudoku", "train": "synthetic", "test": "synthetic", "num_train": 4, "num_test": 4},
        "reference": {"start": SIZES, "train": TRAIN},
        "calibrate": {},
        **TRAINED,
    }
    return parse_recipe({**raw, **sections})


def context(recipe: Recipe, stage: str, temperatures: dict[str, float]) -> StageContext:
    run = RunDirectory(recipe.run_directory)
    stages = stages_of(recipe)
    for name in stages:
        chosen = {"residual_temperatures": temperatures} if name == "calibrate" else {}
        external = {"checkpoint": recipe.checkpoint(name)} if recipe.checkpoint(name) else {}
        run.finish(name, {"stage": name}, chosen | external, datetime.now().astimezone(), 0.0)
    console = Console(file=io.StringIO())
    return StageContext(recipe=recipe, run=run, stage=stage, key="", inputs=stages[stage].inputs, console=console)


def t_res(ctx: StageContext) -> dict[str, float | None]:
    methods = evaluate.with_t_res(ctx, evaluate.make_methods(ctx))
    return {method.info.name: method.settings.residual_temperature for method in methods}


def served(ctx: StageContext) -> float | None:
    description = describe(ctx.recipe, ctx.checkpoint, ctx.residual_temperature("target"))
    return description.models["rcd"].decode.residual_temperature


def test_each_target_has_its_own(tmp_path: Path) -> None:
    variants = {"paper": {"dropout": 0.0}}
    arms = {"hot": {"model": "target", "decode": {"residual": True, "residual_temperature": 3.0}}}
    recipe = make_recipe(tmp_path, variants=variants, evaluate={"starts": ["zero"], "arms": arms})
    chosen = {"target": 0.7, "target-paper": 1.3}
    found = t_res(context(recipe, "evaluate", chosen))
    assert found == {"seqd": None, "target/zero": 0.7, "target-paper/zero": 1.3, "hot": 3.0}
    assert served(context(recipe, "deploy", chosen)) == 0.7


def test_without_the_stage_it_is_one(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, calibrate=None, evaluate={"starts": ["zero"]})
    assert t_res(context(recipe, "evaluate", {})) == {"seqd": None, "target/zero": 1.0}
    assert served(context(recipe, "deploy", {})) == 1.0


@pytest.mark.parametrize("given", [None, 0.5])
def test_a_checkpoint_from_outside_keeps_its_own(tmp_path: Path, given: float | None) -> None:
    outside = {"target": {"start": "/models/rcd", "train": None}, "tokenizer": {"path": "/models/rcd"}}
    decode = {"residual_temperature": given}
    recipe = make_recipe(
        tmp_path, **outside, base=None, baseline=False, calibrate=None,
        evaluate={"starts": ["zero"], "decode": decode}, deploy={"decode": decode},
    )  # fmt: skip
    assert t_res(context(recipe, "evaluate", {})) == {"target/zero": given}
    assert served(context(recipe, "deploy", {})) == given
