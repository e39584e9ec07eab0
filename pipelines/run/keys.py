"""Stage keys: the hash of a flat, readable mapping of everything that a stage's result depends on.

The mapping is stored with the result, so that an error can show which settings differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from functools import cache
from typing import Any

from pipelines.recipe.model import Recipe
from rcd_core.io import storage
from rcd_core.tasks import has_official_grader

# Keys that change how a result is computed but not the result.
_NEUTRAL = (
    "*.train.micro_batch_size",
    "*.train.checkpoint_every",
    "*.train.keep_checkpoints",
    "*.train.log_every",
    "*.train.validate_every",
    "*.train.activation_checkpointing",
    "*.train.compile",
    "*.train.shard_size",
    "data.max_bad_rows",
    "signals.max_bad_rows",
    "*.train.attention",
    "evaluate.batch_size",
    "evaluate.attention",
    "deploy.allow_without_keys",
    "deploy.open_state",
    "deploy.cors_origins",
    "deploy.ingress.*",
    "deploy.attention",
    "deploy.reference_tensor_parallel",
)
# Left out where they have this value, as in runs made before there were these keys.
_LATER: dict[str, Any] = {
    "deterministic": False,
    "evaluate.tasks": {},
    "evaluate.weights": "full",
    "deploy.weights": "full",
    "*.train.lora": None,
    "target.rounds": 1,
    "signals.on_policy": 0.0,
    "target.residual.self_share": 0.0,
    "variants.*.self_share": 0.0,
    "*.train.optimizer": "adamw",
    "*.train.muon_learning_rate": 0.02,
    "baselines.*.optimizer": "adamw",
    "baselines.*.muon_learning_rate": 0.02,
    "*.train.distill": False,
    "baselines.*.distill": False,
    "baselines.*.keep_checkpoints": 2,
    "baselines.*.lora": None,
    "*.decode.schedule": None,
    "*.decode.sub_block_length": None,
    "*.decode.editing_threshold": None,
    "*.decode.max_post_steps": 16,
    "base.convert": None,
    "base.convert.attention": "blocks",
    "noise.layout": "single",
    "noise.group_blocks": 4,
    "noise.complementary": False,
    "data.dialect": None,
    "data.turns": "all",
    "data.reasoning": "keep",
}
_CHECKPOINT_FILES = (".safetensors", ".json", ".txt", ".jinja", ".model")
_ABSENT: dict[str, Any] = {}


def key_of(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def recipe_values(recipe: Recipe, sections: Sequence[str]) -> dict[str, Any]:
    """Dotted key -> value for the recipe's keys in `sections`, without those that do not change a result."""
    flat = flatten(recipe.model_dump(mode="json"))
    chosen = {k: v for k, v in flat.items() if any(k == s or k.startswith(f"{s}.") for s in sections)}
    inheriting = [task.task or name for name, task in recipe.evaluate.tasks.items() if task.grader is None]
    graded = any(map(has_official_grader, [recipe.data.task_of("test"), *inheriting]))
    if recipe.evaluate.grader == "default" or not graded:
        chosen.pop("evaluate.grader", None)  # as in runs made before there was this key
    kept = {k: v for k, v in chosen.items() if not any(fnmatch(k, pattern) for pattern in _NEUTRAL)}
    return {k: v for k, v in kept.items() if not any(fnmatch(k, p) and v == new for p, new in _LATER.items())}


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys. Empty mappings count as values."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}{key}.") if isinstance(inner, dict) and inner else {f"{prefix}{key}": inner}
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines like "noise.draws: 4 there, 8 now". Inputs that are not made yet (None in `new`) are ignored."""
    lines = [
        f"{key}: {_show(old['recipe'].get(key, _ABSENT))} there, {_show(new['recipe'].get(key, _ABSENT))} now"
        for key in _differing(old["recipe"], new["recipe"])
    ]
    lines += [f"{key}: the files have changed" for key in _differing(old["outside"], new["outside"])]
    there, now = old.get("hub", {}), new.get("hub", {})  # an older release stored no commits
    moved = [name for name in there.keys() & now.keys() if there[name] and now[name] and there[name] != now[name]]
    lines += [f"{name}: commit {there[name][:12]} there, {now[name][:12]} now" for name in sorted(moved)]
    pending = {name for name, value in new["inputs"].items() if value is None}
    lines += [f"its input {k!r} has changed" for k in _differing(old["inputs"], new["inputs"]) if k not in pending]
    if old["schema"] != new["schema"]:
        lines.append("it was made by another version of this program")
    return lines


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    # A key that an older release did not have equals null.
    return [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]


def _show(value: Any) -> str:
    return "nothing" if value is _ABSENT else json.dumps(value)


@cache
def fingerprint(path: str | tuple[str, ...]) -> Any:
    """Identity of external data files, or of a checkpoint directory.

    Hashes the bytes of local files. For URIs it uses size and modification time, to avoid downloads.
    """
    if isinstance(path, tuple):
        return [fingerprint(one) for one in path]
    if not storage.is_directory(path):
        return _identity(path)
    return {storage.basename(file): _identity(file) for s in _CHECKPOINT_FILES for file in storage.list_files(path, s)}


def _identity(file: str) -> str:
    content = f"changed {storage.modified(file)}" if storage.is_uri(file) else f"sha256 {storage.sha256(file)}"
    return f"{storage.size(file)} bytes, {content}"
