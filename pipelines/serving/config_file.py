"""Serve's config files, strictly: Serve itself lets unknown keys and names pass, and settings of autoscaling unread.

All problems are found before anything is deployed, in the words that recipes are checked with.
"""

from __future__ import annotations

import copy
import os
import types
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from pipelines.recipe.files import explain, parse_yaml, problems_error, suggestion
from pipelines.serving.description import description_problems, parse_description
from rcd_core.errors import UserError

BUILD, APP = "pipelines.serving.graph:build", "pipelines.serving.graph:app"
CONFIG = "RCD_SERVE_CONFIG"  # an absolute path, on the machine that builds and on the cluster's head


def read_config(path: str) -> dict[str, Any]:
    """The mapping of a Serve config. Raises one UserError with all that is wrong with it."""
    text = _text(path)
    strict = parse_yaml(text, f"Serve config {path}")
    raw = yaml.safe_load(text)  # as Serve reads it
    if not isinstance(raw, dict):
        raise UserError(f"Serve config {path} must be a mapping of keys like `applications:`")
    found = list(config_problems(raw))
    if raw != strict:
        found.append("some values are read as YAML 1.1 here, unlike in recipes: write true and false, 0.001 for 1e-3")
    if found:
        raise problems_error(f"Serve config {path}", found)
    return raw


def app_args() -> Any:
    """What pipelines.serving.graph:app is made from: the args of the first application of ours in the config that
    RCD_SERVE_CONFIG names, by default in cluster/serve.yaml."""
    path = os.environ.get(CONFIG) or str(Path(__file__).parents[2] / "cluster" / "serve.yaml")
    for one in _applications(parse_yaml(_text(path), f"Serve config {path}")):
        if is_ours(one):
            return one.get("args", {})
    raise UserError(f"Serve config {path} has no application with import_path {BUILD}; name another in {CONFIG}")


def is_ours(application: dict[str, Any]) -> bool:
    return application.get("import_path") in (BUILD, BUILD.replace(":", "."))


def config_problems(raw: dict[str, Any]) -> Iterator[str]:
    """One line per problem: the key's path, the value found, what is wanted."""
    yield from _unknown(raw, ServeDeploySchema, "")
    try:
        ServeDeploySchema.model_validate(copy.deepcopy(raw))  # a validator of Serve's writes into what it is given
    except ValidationError as error:
        yield from _values(error, ServeDeploySchema, "")
    for number, one in enumerate(_applications(raw)):
        if is_ours(one) or one.get("import_path") == APP:
            yield from _own(one, f"applications.{number}")


def _own(one: dict[str, Any], where: str) -> Iterator[str]:
    """What Serve cannot know: our builder's args, and the deployments that it makes of them."""
    args, overrides = one.get("args", {}) if is_ours(one) else app_args(), one.get("deployments", [])
    wrong = description_problems(args)
    yield from (f"{where}.args.{line}" for line in wrong)
    if wrong or not isinstance(overrides, list):
        return
    known = parse_description(args).deployments
    names = Counter(str(override.get("name")) for override in overrides if isinstance(override, dict))
    for name, times in names.items():
        if name not in known:
            yield f"{where}.deployments: there is no deployment {name!r}{suggestion(name, known)}: {', '.join(known)}"
        if times > 1:
            yield f"{where}.deployments: {name!r} is given {times} times; keep one"


def _unknown(value: Any, annotation: Any, where: str) -> Iterator[str]:
    """Keys in and below `value` that Serve's classes do not have; and what classes say that Serve does not ask."""
    kinds = _alternatives(annotation)
    if isinstance(value, list):
        items = [typing.get_args(kind)[0] for kind in kinds if typing.get_origin(kind) is list]
        for number, item in enumerate(value):
            for kind in items[:1]:
                yield from _unknown(item, kind, f"{where}{number}.")
        return
    models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    if not isinstance(value, dict) or not models:
        return
    model, known = models[0], models[0].model_fields
    for key, inner in value.items():
        if key in known:
            yield from _unknown(inner, known[key].annotation, f"{where}{key}.")
        else:
            yield f"{where}{key}: unknown key{suggestion(str(key), list(known))}; known here: {', '.join(known)}"
    if any(dict in (kind, typing.get_origin(kind)) for kind in kinds):
        try:
            model.model_validate(copy.deepcopy(value))
        except ValidationError as error:
            yield from _values(error, model, where)


def _values(error: ValidationError, model: type[BaseModel], where: str) -> list[str]:
    """Complaints about values; unknown keys are found by _unknown, also where Serve would let them pass."""
    lines = [line.lstrip(".: ") for line in explain(error, model) if ": unknown key" not in line]
    return [where + line for line in lines]


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Serve config {path} cannot be read ({error}); name a YAML file") from error


def _applications(raw: Any) -> list[dict[str, Any]]:
    """Of a config that may be anything yet."""
    listed = raw.get("applications") if isinstance(raw, dict) else None
    return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []


def _alternatives(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [kind for argument in typing.get_args(annotation) for kind in _alternatives(argument)]
    return [annotation]
