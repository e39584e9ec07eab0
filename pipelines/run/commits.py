"""Repositories on the Hugging Face hub at one commit per run, so that all its processes load the same files.

The hub is asked once. A stage's key and manifest have the commits of what it reads, and later jobs of the run take them
from there: a run keeps its commits when the hub moves on. A new run, or an id with a revision, takes others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from pipelines.recipe.model import Recipe
from pipelines.recipe.sources import HUB_DATA
from rcd_core.errors import UserError
from rcd_core.io.hub import commit_of, is_hub_id, split_hub_id

Commits = dict[str, str | None]  # a checkpoint or data set as the recipe names it -> its commit, None if unknown


def hub_names(values: Iterable[str | tuple[str, ...]]) -> list[str]:
    """Those of the given checkpoints and data sources that are on the hub."""
    names = (name for value in values for name in ((value,) if isinstance(value, str) else value))
    return [name for name in names if name.startswith("hf://") or is_hub_id(name)]


def without(value: str | tuple[str, ...], names: Iterable[str]) -> str | tuple[str, ...]:
    """A checkpoint, or data sources, without those among `names`; empty if none is left."""
    if isinstance(value, str):
        return "" if value in names else value
    return tuple(name for name in value if name not in names)


def ask_commit(name: str) -> str:
    """The commit of a checkpoint or data set now. Raises UserError if it is not known."""
    if match := HUB_DATA.fullmatch(name):
        return commit_of(match["name"], match["revision"], "dataset")
    return commit_of(*split_hub_id(name))


def known_or_asked(names: Iterable[str], known: Mapping[str, str | None]) -> Commits:
    commits: Commits = {}
    for name in names:
        commits[name] = known.get(name)
        if commits[name] is None:
            with suppress(UserError):  # a finished stage does not need it; require_commits tells what does
                commits[name] = ask_commit(name)
    return commits


def require_commits(outside: Mapping[str, str | tuple[str, ...]], commits: Commits) -> None:
    """Ask again for the commits of a stage's inputs that are unknown. Raises UserError, which names the recipe key."""
    for key, value in outside.items():
        for name in hub_names([value]):
            if commits.get(name) is None:
                try:
                    commits[name] = ask_commit(name)
                except UserError as error:
                    raise UserError(f"{key}: {error}") from error


def at_commit(name: str, commits: Mapping[str, str | None]) -> str:
    """owner/name@COMMIT, or hf://owner/name...?revision=COMMIT; other names and those of unknown commit unchanged."""
    commit = commits.get(name)
    if commit is None:
        return name
    return f"{name.partition('?')[0]}?revision={commit}" if "://" in name else f"{name.partition('@')[0]}@{commit}"


def pinned(recipe: Recipe, commits: Mapping[str, str | None]) -> Recipe:
    """The recipe with every checkpoint and data set at its commit."""
    if not any(commits.values()):
        return recipe
    raw = recipe.model_dump(mode="json")
    places: list[tuple[dict[str, Any] | None, str]] = [(raw[name], "start") for name in ("base", "reference", "target")]
    places += [(raw["data"], "train"), (raw["data"], "test"), (raw["tokenizer"], "path"), (raw, "baseline")]
    places += [(task, "test") for task in raw["evaluate"]["tasks"].values()]
    places += [(model, "checkpoint") for model in raw["deploy"]["models"].values()]
    for section, key in places:
        if section and isinstance(section[key], str):
            section[key] = at_commit(section[key], commits)
        elif section and isinstance(section[key], list):
            section[key] = [at_commit(name, commits) for name in section[key]]
    return Recipe.model_validate_json(json.dumps(raw), strict=True)
