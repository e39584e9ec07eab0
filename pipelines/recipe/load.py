"""A recipe from a file, completed and checked, and back to YAML.

recipe = load_recipe("demo", ["target.train.steps=100"])
print(dump_recipe(recipe))     # the effective recipe, as YAML that loads again
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from pipelines.recipe.files import apply_overrides, explain, problems_error, read_recipe
from pipelines.recipe.model import Recipe
from pipelines.recipe.rules import problems
from pipelines.recipe.settings_files import apply_settings


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read recipes/<name>.yaml or a YAML file, apply `--set` overrides "a.b=VALUE", validate.

    Raises one UserError that lists every problem: key path, value, remedy.
    """
    raw = read_recipe(name_or_path)
    apply_overrides(raw, overrides)
    return parse_recipe(raw, name_or_path)


def parse_recipe(raw: dict[str, Any], label: str = "") -> Recipe:
    """A Recipe from the plain mapping that a YAML file holds."""
    raw = dict(raw)
    if raw.get("storage") is None:
        raw["storage"] = Recipe.model_fields["storage"].default
    if isinstance(raw["storage"], str):
        raw["storage"] = os.path.expanduser(raw["storage"])
    apply_settings(raw)
    _complete_entries(raw)
    try:
        # By way of JSON: strict there still takes a list for a tuple and a mapping for a settings class.
        recipe = Recipe.model_validate_json(json.dumps(raw), strict=True)
        found = list(problems(recipe))
    except ValidationError as error:
        found = explain(error, Recipe)
    if found:
        raise problems_error(f"recipe {label or raw.get('name')}", found)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The effective recipe as YAML: every key, defaults and overrides included."""
    return str(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120))


def _complete_entries(raw: dict[str, Any]) -> None:
    """A variant names only what it changes: the rest is the target's; so do a further baseline and an extra arm. An
    entry that is null is none: so a recipe leaves out what the one it extends has."""
    target, evaluate = _mapping(raw.get("target")), _mapping(raw.get("evaluate"))
    raw["variants"] = _completed(raw.get("variants", {}), _mapping(target.get("residual")))
    raw["baselines"] = _completed(raw.get("baselines", {}), _mapping(target.get("train")))
    arms = _completed(evaluate.get("arms", {}), {})
    if isinstance(arms, dict) and arms:
        decode = _mapping(evaluate.get("decode"))
        full = {
            name: {**arm, "decode": {**decode, **_mapping(arm.get("decode"))}}
            for name, arm in arms.items()
            if isinstance(arm, dict) and isinstance(arm.get("decode", {}), dict)
        }
        arms = {**arms, **full}
    if evaluate:
        raw["evaluate"] = {**evaluate, "arms": arms}


def _mapping(value: Any) -> dict[str, Any]:
    """A section, or nothing where something else stands: validation says so."""
    return value if isinstance(value, dict) else {}


def _completed(entries: Any, rest: dict[str, Any]) -> Any:
    if not isinstance(entries, dict):
        return entries
    present = {name: entry for name, entry in entries.items() if entry is not None}
    return {name: {**rest, **entry} if isinstance(entry, dict) else entry for name, entry in present.items()}
