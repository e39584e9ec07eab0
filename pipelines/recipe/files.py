"""Recipe files: YAML 1.2, `extends`, `--set` overrides, and readable validation errors."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rcd_core.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"


RUN_NAME, ENTRY_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$", r"^[A-Za-z0-9_]+$"
ORIGIN = r"^(\*|https?://[^/\s]+)$"
PATTERNS = {  # in words, for messages
    RUN_NAME: "letters, digits and . _ -, with a letter or digit first",
    ENTRY_NAME: "letters, digits and _",
    ORIGIN: "* or an origin such as https://chat.example.org",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: 1e-3 is a number (YAML 1.1 reads a string); on, off and dates are strings."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|false|False", "tTfF"),
    ("null", r"null|Null|~|", ["n", "N", "~", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
# YAML 1.1 reads 010 as octal and 1e3 as a string; use Python's rules.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def parse_yaml(text: str, label: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        raise UserError(f"{label} is not valid YAML: {' '.join(str(error).split())}") from error


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """The mapping of a packaged recipe (by name) or of a YAML file.

    `extends: NAME` starts from another recipe, a packaged one or a file in the same directory: sections are merged key
    by key, other values are replaced. Raises UserError, which suggests the nearest name.
    """
    return _read(name_or_path, Path(), ())


def _read(name_or_path: str, directory: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """directory: where relative paths start. extending: the recipes that extend this one, outermost first."""
    path = RECIPES / f"{name_or_path}.yaml"
    if not re.fullmatch(r"[\w-][\w.-]*", name_or_path) or not path.exists():
        path = directory / Path(name_or_path).expanduser()
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"is not readable ({error})"
        why = f"which {why}" if extending else why
        by = f"{extending[-1]}: extends is " if extending else ""
        raise UserError(
            f"recipe {by}{name_or_path!r} {why}{suggestion(name_or_path, recipe_names())}; give one of "
            f"{', '.join(recipe_names())} or the path of a YAML file"
        ) from error
    raw = parse_yaml(text, f"recipe {path}")
    if not isinstance(raw, dict):
        raise UserError(f"recipe {path} must be a mapping of keys like `name:` and `data:`; it is {type(raw).__name__}")
    if (base := raw.pop("extends", None)) is None:
        return raw
    if not isinstance(base, str) or path.resolve() in extending:
        why = "which leads back to this recipe" if isinstance(base, str) else "which is no name"
        raise UserError(f"recipe {path}: extends is {base!r}, {why}; give another recipe's name or file")
    return merged(_read(base, path.parent, (*extending, path.resolve())), raw)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two mappings key by key, recursively; values of `above` win."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        result[key] = merged(inner, value) if both else value  # type: ignore[arg-type]
    return result


def apply_overrides(raw: dict[str, Any], overrides: Iterable[str]) -> None:
    """Set each "a.b.c=VALUE" (VALUE is YAML) in place; create missing sections."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {override!r} must have the form KEY=VALUE, as in --set seed=1")
        *sections, last = key.strip().split(".")
        section = raw
        for depth, name in enumerate(sections):
            if section.get(name) is None:
                section[name] = {}
            if not isinstance(section[name], dict):
                path = ".".join(sections[: depth + 1])
                raise UserError(f"--set {override!r}: {path} is {section[name]!r}, not a section; set it as a whole")
            section = section[name]
        section[last] = parse_yaml(text, f"--set {override!r}")


def suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def problems_error(label: str, problems: Sequence[str]) -> UserError:
    """One error for all problems of `label`."""
    lines = [f"{label} has problems:", *problems]
    return UserError(f"{label}: {problems[0]}" if len(problems) == 1 else "\n  ".join(lines))


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line per validation error: key, value, what is allowed."""
    details = error.errors()
    inner = {detail["loc"][: i + 1] for detail in details for i in range(len(detail["loc"]) - 1)}
    # Skip "list too short" when its items have errors of their own.
    details = [d for d in details if d["type"] != "too_short" or d["loc"] not in inner]
    return [_explain_one(detail, model) for detail in details]


def _explain_one(detail: Any, model: type[BaseModel]) -> str:
    # Tags of unions (see types.ModelSource) are in angle brackets; they are no keys.
    loc = [str(part) for part in detail["loc"] if not str(part).startswith("<")]
    path, value, kind = ".".join(loc), detail["input"], detail["type"]
    if loc and loc[-1] == "[key]":  # a name that is a key itself
        path = f"{'.'.join(loc[:-2])}: the name"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys_at(model, loc[:-1])
        return f"{path}: unknown key{suggestion(loc[-1], known)}; known here: {', '.join(known)}"
    if kind.startswith("missing"):
        return f"{path} is missing; add it"
    if kind == "value_error":  # from a settings class; the message starts with the name of the field
        message = str(detail["ctx"]["error"])
        section = loc[-1] if loc else ""
        first = re.match(r"(?:\w+\.)*(\w+)", message)
        if first and first[1] in _keys_at(model, loc):
            return f"{path}.{message[first.start(1) :]}"
        return f"{path}: {message}" if section else message
    allowed = re.sub(r"^(Input|String|Tuple|List) should", "it should", detail["msg"]).partition(" after validation")[0]
    if kind == "string_pattern_mismatch":
        allowed = f"it should be {PATTERNS.get(detail['ctx']['pattern'], detail['ctx']['pattern'])}"
    if kind in ("dataclass_type", "model_type", "dict_type"):
        checkpoint = ", or a path, URI or hub id" if "<config>" in detail["loc"] else ""
        allowed = f"it should be a mapping of keys{checkpoint}"
    return f"{path} is {'null' if value is None else repr(value)}; {allowed}"


def _keys_at(model: Any, loc: Sequence[str]) -> list[str]:
    """The keys that are allowed at a path of the recipe."""
    places = [model]
    for part in loc:
        places = [inner for place in places for inner in _step(place, part)]
    return [name for place in places for name in _fields(place)]


def union_members(annotation: Any) -> list[Any]:
    """The members of an annotation, without Annotated, Union and None."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return union_members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [inner for argument in typing.get_args(annotation) for inner in union_members(argument)]
    return [] if annotation is type(None) else [annotation]


def _fields(place: Any) -> dict[str, Any]:
    if isinstance(place, type) and (issubclass(place, BaseModel) or dataclasses.is_dataclass(place)):
        own = set(place.model_fields) if issubclass(place, BaseModel) else {f.name for f in dataclasses.fields(place)}
        hints = typing.get_type_hints(place, include_extras=True)
        return {name: hint for name, hint in hints.items() if name in own}
    return {}


def _step(place: Any, part: str) -> list[Any]:
    if typing.get_origin(place) is dict:
        return union_members(typing.get_args(place)[1])
    return union_members(_fields(place).get(part, type(None)))
