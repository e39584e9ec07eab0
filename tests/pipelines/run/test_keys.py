"""Which settings of a recipe decide a stage's key."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.recipe.load import load_recipe
from pipelines.run.keys import recipe_values
from pipelines.run.stages import stages_of


def values(*changes: str) -> dict[str, Any]:
    return recipe_values(load_recipe("sudoku-reference", changes), ("evaluate", "deploy", "base"))


def test_a_run_made_before_a_setting_existed_keeps_its_keys() -> None:
    """Unless the setting changes a result."""
    plain = values()
    assert not any(name.endswith("decode.schedule") for name in plain) and "base.train.schedule" in plain
    assert values("deploy.reference_tensor_parallel=2", "base.train.compile=true") == plain
    assert values("evaluate.decode.schedule=time")["evaluate.decode.schedule"] == "time"


def stage_values(stage: str, *changes: str) -> dict[str, Any]:
    recipe = load_recipe("demo", changes)
    return recipe_values(recipe, stages_of(recipe)[stage].sections)


@pytest.mark.parametrize("stage", ["base", "signals", "round-1", "target", "baseline", "evaluate", "deploy"])
def test_results_that_are_not_deterministic_are_not_taken_for_such(stage: str) -> None:
    before = stage_values(stage)
    assert stage_values(stage, "deterministic=true") == before | {"deterministic": True} != before


def test_how_a_target_from_outside_is_decoded_is_part_of_the_evaluations_key() -> None:
    """Of a target that the run trained it is part of that stage's."""
    outside = ["base=null", "target.start=/x", "target.train=null", "tokenizer.path=/x", "baseline=false"]
    outside += ["deploy.baseline=false", "reference=null", "target.rounds=1"]
    plain = [*outside, "target.residual.source=none"]
    assert stage_values("evaluate", *outside) != stage_values("evaluate", *plain)
    assert "target.residual.source" not in stage_values("evaluate") | stage_values("evaluate", *outside)
