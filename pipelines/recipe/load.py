"""A recipe from a file, completed and checked, and back to YAML.

recipe = load_recipe("demo", ["target.train.steps=100"])
print(dump_recipe(recipe))     # the effective recipe, as YAML that loads again
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import yaml
from pydantic import ValidationError

from pipelines.recipe.files import apply_overrides, explain, problems_error, read_recipe
from pipelines.recipe.model import Recipe
from pipelines.recipe.rules import problems
from pipelines.recipe.settings_files import apply_settings
from rcd_core.errors import UserError
from rcd_core.io.gguf import package_file


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read recipes/<name>.yaml or a YAML file, apply overrides "a.b=VALUE" (those of --set), and validate.

    Raises one UserError that lists every problem with key, value and remedy.
    """
    raw = read_recipe(name_or_path)
    apply_overrides(raw, overrides)
    return parse_recipe(raw, name_or_path)


def parse_recipe(raw: dict[str, Any], label: str = "") -> Recipe:
    """A Recipe from the mapping in a YAML file. label: names it in errors."""
    raw = dict(raw)
    if raw.get("storage") is None:
        raw["storage"] = Recipe.model_fields["storage"].default
    if isinstance(raw["storage"], str):
        raw["storage"] = os.path.expanduser(raw["storage"])
    _find_packages(raw)
    apply_settings(raw)
    _complete_entries(raw)
    try:
        # Via JSON, where strict mode accepts lists for tuples and mappings for settings classes.
        recipe = Recipe.model_validate_json(json.dumps(raw), strict=True)
        messages = list(problems(recipe))
    except ValidationError as error:
        messages = explain(error, Recipe)
    if messages:
        raise problems_error(f"recipe {label or raw.get('name')}", messages)
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The effective recipe as YAML, with all defaults and overrides. It loads again."""
    return str(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120))


def _find_packages(raw: dict[str, Any]) -> None:
    """Replace package://NAME/FILE, so that a recipe can name a checkpoint in an installed package; inputs.py names a
    package that is missing."""
    for section, key in (("base", "start"), ("reference", "start"), ("target", "start"), ("tokenizer", "path")):
        if isinstance(value := _mapping(raw.get(section)).get(key), str):
            with suppress(UserError):
                raw[section] = {**raw[section], key: package_file(value)}


def _complete_entries(raw: dict[str, Any]) -> None:
    """Fill up entries that give only what they change: variants, baselines, evaluate.arms and evaluate.tasks.

    A null entry is removed, so that a recipe can drop what it inherits. Wrong types stay for validation to report.
    """
    target, evaluate = _mapping(raw.get("target")), _mapping(raw.get("evaluate"))
    raw["variants"] = _completed(raw.get("variants", {}), _mapping(target.get("residual")))
    raw["baselines"] = _completed(raw.get("baselines", {}), _mapping(target.get("train")))
    if evaluate:
        decode = _mapping(evaluate.get("decode"))
        entries = {key: _with_decode(evaluate.get(key, {}), decode) for key in ("arms", "tasks")}
        raw["evaluate"] = {**evaluate, **entries}


def _with_decode(entries: Any, decode: dict[str, Any]) -> Any:
    """Entries whose `decode` gives only what differs from another one."""
    present = _completed(entries, {})
    if not isinstance(present, dict):
        return present
    full = {
        name: {**entry, "decode": {**decode, **_mapping(entry.get("decode"))}}
        for name, entry in present.items()
        if isinstance(entry, dict) and isinstance(entry.get("decode", {}), dict)
    }
    return {**present, **full}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _completed(entries: Any, defaults: dict[str, Any]) -> Any:
    if not isinstance(entries, dict):
        return entries
    present = {name: entry for name, entry in entries.items() if entry is not None}
    return {name: {**defaults, **entry} if isinstance(entry, dict) else entry for name, entry in present.items()}
