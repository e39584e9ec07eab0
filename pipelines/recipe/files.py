"""Recipe files: YAML without its surprises, `--set` overrides, and pydantic's complaints in the reader's words."""

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


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: 1e-3 is a number (PyYAML's 1.1 reads a string), on/off and dates are strings."""

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
# 1.1 would read 010 as octal and has no 1e3: build numbers as Python does.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def parse_yaml(text: str, label: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        raise UserError(f"{label} is no valid YAML: {' '.join(str(error).split())}") from error


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """The mapping of a packaged recipe (by name) or of a YAML file. Raises UserError, with the nearest name.

    `extends: NAME` takes everything from another recipe, a packaged one or a file beside this one, and changes what is
    said here: sections are merged key by key, anything else is replaced.
    """
    return _read(name_or_path, Path(), ())


def _read(name_or_path: str, beside: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """above: the recipes that extend this one, outermost first."""
    path = RECIPES / f"{name_or_path}.yaml"
    if not re.fullmatch(r"[\w-][\w.-]*", name_or_path) or not path.exists():
        path = beside / Path(name_or_path).expanduser()
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = "exists nowhere" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(
            f"recipe {name_or_path!r} {why}{suggestion(name_or_path, recipe_names())}; give one of "
            f"{', '.join(recipe_names())} or the path of a YAML file"
        ) from error
    raw = parse_yaml(text, f"recipe {path}")
    if not isinstance(raw, dict):
        raise UserError(f"recipe {path} must be a mapping of keys like `name:` and `data:`; it is {type(raw).__name__}")
    if (base := raw.pop("extends", None)) is None:
        return raw
    if not isinstance(base, str) or path.resolve() in above:
        why = "in the end itself" if isinstance(base, str) else "no name"
        raise UserError(f"recipe {path}: extends is {base!r}, {why}; give another recipe's name or file")
    return merged(_read(base, path.parent, (*above, path.resolve())), raw)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two sections as one; where both give a value, the one above counts, and mappings are merged key by key."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        result[key] = merged(inner, value) if both else value  # type: ignore[arg-type]
    return result


def apply_overrides(raw: dict[str, Any], overrides: Iterable[str]) -> None:
    """Set "a.b.c=VALUE" (VALUE is YAML) in place; missing sections on the way are made."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {override!r} must have the form KEY=VALUE, as in --set seed=1")
        *sections, last = key.strip().split(".")
        place = raw
        for depth, section in enumerate(sections):
            if place.get(section) is None:
                place[section] = {}
            if not isinstance(place[section], dict):
                where = ".".join(sections[: depth + 1])
                raise UserError(f"--set {override!r}: {where} is {place[section]!r}, no section; set it as a whole")
            place = place[section]
        place[last] = parse_yaml(text, f"--set {override!r}")


def suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def problems_error(label: str, found: Sequence[str]) -> UserError:
    """All that was found wrong with something, in one error."""
    return UserError(f"{label}: {found[0]}" if len(found) == 1 else "\n  ".join([f"{label} has problems:", *found]))


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line per problems_error: the key's path, the value found, what is wanted."""
    details = error.errors()
    inner = {detail["loc"][: i + 1] for detail in details for i in range(len(detail["loc"]) - 1)}
    # A list that is too short only because its items are wrong is no problems_error of its own.
    details = [d for d in details if d["type"] != "too_short" or d["loc"] not in inner]
    return [_explain_one(detail, model) for detail in details]


def _explain_one(detail: Any, model: type[BaseModel]) -> str:
    # Tags of unions (see config.ModelSource) stand in angle brackets: they are no keys.
    loc = [str(part) for part in detail["loc"] if not str(part).startswith("<")]
    path, value, kind = ".".join(loc), detail["input"], detail["type"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys_at(model, loc[:-1])
        return f"{path}: unknown key{suggestion(loc[-1], known)}; known here: {', '.join(known)}"
    if kind.startswith("missing"):
        return f"{path} is missing; add it"
    if kind == "value_error":  # a settings class's own message, which starts with its name for the field
        message = str(detail["ctx"]["error"])
        section = loc[-1] if loc else ""
        first = re.match(r"(?:\w+\.)*(\w+)", message)
        if first and first[1] in _keys_at(model, loc):
            return f"{path}.{message[first.start(1) :]}"
        return f"{path}: {message}" if section else message
    wanted = re.sub(r"^(Input|String|Tuple|List) should", "it should", detail["msg"]).partition(" after validation")[0]
    if kind in ("dataclass_type", "model_type", "dict_type"):
        checkpoint = ", or a path, URI or hub id" if "<config>" in detail["loc"] else ""
        wanted = f"it should be a mapping of keys{checkpoint}"
    return f"{path} is {'null' if value is None else repr(value)}; {wanted}"


def _keys_at(model: Any, loc: Sequence[str]) -> list[str]:
    """Names of the keys allowed at a place of the recipe, by walking the annotations."""
    places = [model]
    for part in loc:
        places = [inner for place in places for inner in _step(place, part)]
    return [name for place in places for name in _fields(place)]


def _plain(annotation: Any) -> list[Any]:
    """The alternatives of an annotation without Annotated, Union and None around them."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _plain(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [inner for argument in typing.get_args(annotation) for inner in _plain(argument)]
    return [] if annotation is type(None) else [annotation]


def _fields(place: Any) -> dict[str, Any]:
    if isinstance(place, type) and (issubclass(place, BaseModel) or dataclasses.is_dataclass(place)):
        own = set(place.model_fields) if issubclass(place, BaseModel) else {f.name for f in dataclasses.fields(place)}
        hints = typing.get_type_hints(place, include_extras=True)
        return {name: hint for name, hint in hints.items() if name in own}
    return {}


def _step(place: Any, part: str) -> list[Any]:
    if typing.get_origin(place) is dict:
        return _plain(typing.get_args(place)[1])
    return _plain(_fields(place).get(part, type(None)))
