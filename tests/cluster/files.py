"""The shipped cluster files, and helpers to read and change them."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from typing import Any

import yaml

from tests.conftest import ROOT

CLUSTER = ROOT / "cluster"
LAUNCHED = ("aws", "gcp", "onprem")  # by `ray up`
KUBERAY = ("raycluster", "rayjob", "rayservice")
TEXTS = [path for path in sorted(CLUSTER.rglob("*")) if path.suffix in (".yaml", ".md", ".py", ".lock", ".json")]
TEXTS += [CLUSTER / "Dockerfile", CLUSTER / "Dockerfile.dockerignore"]


def launcher(name: str) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    return raw


def kuberay(name: str) -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load((CLUSTER / "kuberay" / f"{name}.yaml").read_text())
    return raw


def ray_cluster_spec(raw: dict[str, Any]) -> dict[str, Any]:
    """The RayCluster spec inside a KubeRay resource."""
    spec: dict[str, Any] = raw["spec"]
    where = {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec"), "RayService": spec.get("rayClusterConfig")}
    found: dict[str, Any] = where[raw["kind"]]
    return found


def changed(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at path a/b/0/c; None removes the key."""
    result = copy.deepcopy(raw)
    *above, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place: Any = result
    for part in above:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return result


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, scalar) of every leaf."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
        return
    for key, inner in items:
        yield from leaves(inner, f"{path}/{key}" if path else str(key))


def commands(text: str) -> Iterator[list[str]]:
    """Commands in shell text, split into words, without comments, redirections and leading variable assignments."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                plain = [w for i, w in enumerate(words) if "=" not in w or any("=" not in v for v in words[:i])]
                yield from [plain] if plain else []
                words = []
            elif set(word) <= set("<>"):
                words.append("")  # the next word is the file name; skip it too
            elif words and words[-1] == "":
                words.pop()
            else:
                words.append(word)


def fenced(markdown: str) -> Iterator[str]:
    """The ```sh blocks of a Markdown text."""
    yield from re.findall(r"^```sh\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
