"""Packages that a recipe needs are asked for before any stage starts."""

from __future__ import annotations

import pytest

from pipelines.recipe import inputs
from pipelines.recipe.load import load_recipe
from rcd_core.errors import UserError


@pytest.mark.parametrize(
    ("setting", "key", "package"),
    [
        ("target.train.lora={rank: 2}", "target.train.lora", "peft"),
        ("evaluate.weights=int8", "evaluate.weights", "torchao"),
        ("deploy.weights=fp8", "deploy.weights", "torchao"),
    ],
)
def test_a_missing_package_is_named(setting: str, key: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("sudoku-reference", ["target.train.optimizer=adamw", setting])
    monkeypatch.setattr(inputs, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(UserError, match=f"{key}.*{package}"):
        inputs.check_inputs(recipe)
    monkeypatch.setattr(inputs, "find_spec", lambda name: object())
    inputs.check_inputs(recipe)
