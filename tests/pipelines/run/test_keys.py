"""Which settings of a recipe decide a stage's key."""

from __future__ import annotations

from typing import Any

from pipelines.recipe.load import load_recipe
from pipelines.run.keys import recipe_values


def values(*changes: str) -> dict[str, Any]:
    return recipe_values(load_recipe("sudoku-reference", changes), ("evaluate", "deploy", "base"))


def test_a_run_made_before_a_setting_existed_keeps_its_keys() -> None:
    """Unless the setting changes a result."""
    plain = values()
    assert not any(name.endswith("decode.schedule") for name in plain) and "base.train.schedule" in plain
    assert values("deploy.reference_tensor_parallel=2", "base.train.compile=true") == plain
    assert values("evaluate.decode.schedule=time")["evaluate.decode.schedule"] == "time"
