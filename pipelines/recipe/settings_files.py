"""Evaluation settings as files: the decoding settings of a paper, recorded with every result.

    evaluate: {settings: paper-sdar-b64}          # in a recipe; `--settings paper-sdar-b64` of `rcd evaluate`

A file holds defaults for the section `evaluate` of a recipe, and under `tasks` what differs for some test tasks. Keys
of the recipe win; results then list them as changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.recipe.files import merged, parse_yaml, suggestion
from pipelines.recipe.model import Recipe
from rcd_core.errors import UserError

SETTINGS = Path(__file__).parents[1] / "settings"
_KEYS = {"source", "unpublished", "block_length", "evaluate", "tasks"}


@dataclass(frozen=True)
class EvaluationSettings:
    """One settings file.

    source: the publication. unpublished: what it leaves open, and our choice. block_length None: the checkpoint's.
    evaluate, tasks: keys of a recipe's `evaluate`, for all test tasks and by task. sha256: of the file.
    """

    name: str
    source: str
    unpublished: tuple[str, ...]
    block_length: int | None
    evaluate: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    sha256: str

    def of(self, task: str) -> dict[str, Any]:
        """The section `evaluate` for a test task."""
        return merged(self.evaluate, self.tasks.get(task, {}))


def settings_names() -> list[str]:
    return sorted(path.stem for path in SETTINGS.glob("*.yaml"))


def read_settings(name: str) -> EvaluationSettings:
    """Read a shipped file by its name. Raises UserError, which suggests the nearest name."""
    path = SETTINGS / f"{name}.yaml"
    if not re.fullmatch(r"[\w-][\w.-]*", name) or not path.exists():
        known = settings_names()
        raise UserError(
            f"evaluate.settings is {name!r}, an unknown file{suggestion(name, known)}; the files are {', '.join(known)}"
        )
    content = path.read_bytes()
    raw = parse_yaml(content.decode(), f"settings {name}")
    if not isinstance(raw, dict) or set(raw) - _KEYS:
        raise UserError(f"settings {name}: the allowed keys are {', '.join(sorted(_KEYS))}")
    return EvaluationSettings(
        name=name,
        source=str(raw["source"]).strip(),
        unpublished=tuple(str(line).strip() for line in raw.get("unpublished") or ()),
        block_length=raw.get("block_length"),
        evaluate=raw.get("evaluate") or {},
        tasks=raw.get("tasks") or {},
        sha256=hashlib.sha256(content).hexdigest(),
    )


def apply_settings(raw: dict[str, Any]) -> None:
    """Fill up the section `evaluate` of a recipe's mapping from the settings file that it names."""
    evaluate, data = raw.get("evaluate"), raw.get("data")
    if isinstance(evaluate, dict) and isinstance(evaluate.get("settings"), str) and isinstance(data, dict):
        settings = read_settings(evaluate["settings"])
        raw["evaluate"] = merged(settings.of(str(data.get("test_task") or data.get("task"))), evaluate)
        tasks = evaluate.get("tasks")
        if isinstance(tasks, dict) and tasks:
            filled = {name: _task(settings, name, task, evaluate) for name, task in tasks.items()}
            raw["evaluate"] = {**raw["evaluate"], "tasks": filled}


def _task(settings: EvaluationSettings, name: str, task: Any, evaluate: dict[str, Any]) -> Any:
    """An entry of evaluate.tasks, filled up as the section itself is: the recipe's own keys win over the file's."""
    if not isinstance(task, dict):
        return task
    section = merged(settings.of(str(task.get("task") or name)), evaluate)
    return merged({key: section[key] for key in ("thresholds", "samples", "decode") if key in section}, task)


def provenance(recipe: Recipe) -> dict[str, Any] | None:
    """The recipe's settings file for results: name, sha256, source, unpublished, and the keys that the recipe changes.

    None when the recipe names no file.
    """
    if recipe.evaluate.settings is None:
        return None
    settings = read_settings(recipe.evaluate.settings)
    used = json.loads(recipe.evaluate.model_dump_json())
    changed = _differing(settings.of(recipe.data.task_of("test")), used)
    if settings.block_length not in (None, recipe.evaluate.decode.block_length or recipe.block_length):
        changed.append("block_length")
    return {
        "name": settings.name,
        "sha256": settings.sha256,
        "source": settings.source,
        "unpublished": list(settings.unpublished),
        "changed": changed,
    }


def _differing(published: Mapping[str, Any], used: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in published.items():
        if isinstance(value, dict):
            keys += _differing(value, used.get(key) or {}, f"{prefix}{key}.")
        elif used.get(key) != value:
            keys.append(prefix + key)
    return keys
