"""Strict checks of Serve config files, before anything is deployed.

Serve itself ignores unknown keys and deployment names, and does not check autoscaling settings.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from pipelines.recipe.files import explain, parse_yaml, problems_error, suggestion, union_members
from pipelines.serving.description import description_problems, parse_description
from rcd_core.errors import UserError

BUILD, APP = "pipelines.serving.graph:build", "pipelines.serving.graph:app"
CONFIG = "RCD_SERVE_CONFIG"  # an absolute path, set where `serve build` runs and on the cluster's head


def read_config(path: str) -> dict[str, Any]:
    """The mapping of a Serve config. Raises one UserError that lists every problem."""
    text = _text(path)
    strict = parse_yaml(text, f"Serve config {path}")
    raw = yaml.safe_load(text)  # as Serve reads it
    if not isinstance(raw, dict):
        raise UserError(f"Serve config {path} must be a mapping of keys like `applications:`")
    problems = list(config_problems(raw))
    if raw != strict:
        problems.append("Serve reads some values as YAML 1.1, unlike recipes: write true and false, 0.001 for 1e-3")
    if problems:
        raise problems_error(f"Serve config {path}", problems)
    return raw


def app_args() -> Any:
    """The args of pipelines.serving.graph:app: those of the first application of this project in the config that
    RCD_SERVE_CONFIG names, by default cluster/serve.yaml."""
    path = os.environ.get(CONFIG) or str(Path(__file__).parents[2] / "cluster" / "serve.yaml")
    for application in _applications(parse_yaml(_text(path), f"Serve config {path}")):
        if is_ours(application):
            return application.get("args", {})
    raise UserError(f"Serve config {path} has no application with import_path {BUILD}; name another file in {CONFIG}")


def http_host(config: dict[str, Any]) -> str:
    """The host on which Serve listens by a config without problems."""
    return str(ServeDeploySchema.model_validate(copy.deepcopy(config)).http_options.host)


def is_ours(application: dict[str, Any]) -> bool:
    return application.get("import_path") in (BUILD, BUILD.replace(":", "."))


def config_problems(raw: dict[str, Any]) -> Iterator[str]:
    """One line per problem: the key's path, its value, the remedy."""
    yield from _unknown(raw, ServeDeploySchema, "")
    try:
        ServeDeploySchema.model_validate(copy.deepcopy(raw))  # one of Serve's validators changes its input
    except ValidationError as error:
        yield from _values(error, ServeDeploySchema, "")
    for number, application in enumerate(_applications(raw)):
        if is_ours(application) or application.get("import_path") == APP:
            yield from _application_problems(application, f"applications.{number}")
        else:
            yield from _import_problems(application, f"applications.{number}.import_path")


def _import_problems(application: dict[str, Any], where: str) -> Iterator[str]:
    """A module that is not here, unless the application brings its code along. Nothing is imported but its parents."""
    path, environment = application.get("import_path"), application.get("runtime_env") or {}
    if not isinstance(path, str) or not isinstance(environment, dict):
        return
    module = path.rpartition(":")[0] or path.rpartition(".")[0]
    if module == BUILD.partition(":")[0]:
        yield f"{where}: {path!r} does not exist{suggestion(path, [BUILD, APP])}"
    elif not {"working_dir", "py_modules"} & environment.keys():
        try:
            found = importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            found = False
        if not found:
            yield f"{where}: {path!r} names a module that is not installed here; correct it, or install it"


def _application_problems(application: dict[str, Any], where: str) -> Iterator[str]:
    """What Serve cannot check: the args of our builder, and the names of the deployments that it builds."""
    args = application.get("args", {}) if is_ours(application) else app_args()
    problems, overrides = description_problems(args), application.get("deployments", [])
    yield from (f"{where}.args.{line}" for line in problems)
    if problems or not isinstance(overrides, list):
        return
    known = parse_description(args).deployments
    names = Counter(str(override.get("name")) for override in overrides if isinstance(override, dict))
    for name, times in names.items():
        if name not in known:
            yield f"{where}.deployments: unknown deployment {name!r}{suggestion(name, known)}; has {', '.join(known)}"
        if times > 1:
            yield f"{where}.deployments: {name!r} occurs {times} times; keep one"


def _unknown(value: Any, annotation: Any, where: str) -> Iterator[str]:
    """Keys in and below `value` that Serve's classes do not have, and complaints of classes that Serve does not
    apply."""
    kinds = union_members(annotation)
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
            yield f"{where}{key}: unknown key{suggestion(str(key), list(known))}; known: {', '.join(known)}"
    if any(dict in (kind, typing.get_origin(kind)) for kind in kinds):
        try:
            model.model_validate(copy.deepcopy(value))
        except ValidationError as error:
            yield from _values(error, model, where)


def _values(error: ValidationError, model: type[BaseModel], where: str) -> list[str]:
    """Complaints about values. Unknown keys are left to _unknown."""
    lines = [line.lstrip(".: ") for line in explain(error, model) if ": unknown key" not in line]
    return [where + line for line in lines]


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Serve config {path} cannot be read ({error}); name a YAML file") from error


def _applications(raw: Any) -> list[dict[str, Any]]:
    """The applications of an unchecked config."""
    applications = raw.get("applications") if isinstance(raw, dict) else None
    return [a for a in applications if isinstance(a, dict)] if isinstance(applications, list) else []
