"""The files and checkpoints that a recipe names, checked before anything starts."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

from pipelines.recipe.model import Recipe
from pipelines.recipe.sources import checkpoints, data_files
from pipelines.recipe.worker_rules import trainings
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.io.gguf import is_gguf, package_file


def check_inputs(recipe: Recipe) -> None:
    """Raise UserError, with key, file and remedy, unless every file and checkpoint of the recipe exists and fits."""
    tasks = {f"evaluate.tasks.{name}.test": task.test for name, task in recipe.evaluate.tasks.items()}
    for key, source in {"data.train": recipe.data.train, "data.test": recipe.data.test, **tasks}.items():
        for path in data_files(source):
            if not _exists(key, path):
                raise UserError(f"{key}: {path} does not exist; correct the path or copy the file there")
            if storage.is_directory(path) or storage.size(path) == 0:
                raise UserError(f"{key}: {path} is a directory or an empty file; give a file of rows")
    served = {f"deploy.models.{name}.checkpoint": model.checkpoint for name, model in recipe.deploy.models.items()}
    external = {k: path for k, path in (checkpoints(recipe) | served).items() if storage.is_absolute(path)}
    for key, path in external.items():
        if key == "tokenizer.path" and not is_gguf(path):
            _require_file(key, path, "tokenizer_config.json", "it must hold a Hugging Face tokenizer")
        elif is_gguf(path):
            if not _exists(key, package_file(path)):
                raise UserError(f"{key}: {path} does not exist; correct the path")
        else:
            _require_file(key, path, "config.json", "it must hold a Hugging Face checkpoint")
            if not storage.list_files(path, ".safetensors"):
                raise UserError(f"{key}: {path} has no *.safetensors; convert the weights; pickled ones are refused")
    _require_packages(recipe)
    for key in ("reference.start", "baseline"):
        if key in external and "target.start" in external:
            _require_same_vocabulary(key, external[key], external["target.start"])


def _require_packages(recipe: Recipe) -> None:
    used = {f"{key}.lora": ("peft", "lora") for key, train in trainings(recipe).items() if train.lora}
    for key, weights in (("evaluate", recipe.evaluate.weights), ("deploy", recipe.deploy.weights)):
        used |= {f"{key}.weights": ("torchao", "quantise")} if weights != "full" else {}
    for tool in recipe.trackers:
        if find_spec(tool) is None:
            raise UserError(
                f"trackers has {tool!r}, which is not installed where the job runs: pip install 'rcd-ray[{tool}]'"
            )
    for key, (package, extra) in used.items():
        if find_spec(package) is None:
            raise UserError(f"{key} needs the package {package}, on every node: pip install 'rcd-ray[{extra}]'")


def _exists(key: str, path: str) -> bool:
    try:
        return storage.exists(path)
    except OSError as error:
        raise UserError(f"{key}: {path} is not accessible ({error}); check the address and your credentials") from error


def _require_file(key: str, directory: str, name: str, why: str) -> None:
    if not _exists(key, directory):
        raise UserError(f"{key}: {directory} does not exist; {why}")
    if not storage.exists(storage.join(directory, name)):
        raise UserError(f"{key}: {directory} has no {name}; {why}")


def _require_same_vocabulary(key: str, other: str, target: str) -> None:
    sizes = [storage.read_json(storage.join(path, "config.json")).get("vocab_size") for path in (other, target)]
    remedy = f"{key} must be a checkpoint with the target's tokenizer"
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{key} {other} has a vocabulary of {sizes[0]} tokens, target.start {target} one of {sizes[1]}; {remedy}"
        )
    vocabularies = [_vocabulary(path) for path in (other, target)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise UserError(f"{key} {other} and target.start {target} have different token ids; {remedy}")


def _vocabulary(checkpoint: str) -> Any:
    """Token -> id from tokenizer.json; None when the tokenizer has another format."""
    path = storage.join(checkpoint, "tokenizer.json")
    return json.loads(storage.read_bytes(path)).get("model", {}).get("vocab") if storage.exists(path) else None
