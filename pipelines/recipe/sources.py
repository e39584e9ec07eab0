"""What a recipe reads from outside: data files and checkpoints, and the rules for their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from pipelines.recipe.model import Recipe
from rcd_core.io import storage
from rcd_core.io.hub import is_hub_id
from rcd_core.tasks.files import SUFFIXES

SYNTHETIC = "synthetic"
HUB_DATA = re.compile(
    r"hf://(?P<name>[\w.-]+/[\w.-]+)(@(?P<config>[\w.-]+))?(:(?P<split>[^\s?]+))?(\?revision=(?P<revision>[\w./-]+))?"
)
ABSOLUTE = "jobs run in a temporary copy of the working directory, so give an absolute path or a URI"


def checkpoints(recipe: Recipe) -> dict[str, str]:
    """Recipe key -> checkpoint or tokenizer from outside the run."""
    starts = {
        "base.start": recipe.base.start if recipe.base else None,
        "reference.start": recipe.reference.start if recipe.reference else None,
        "target.start": recipe.target.start,
        "baseline": recipe.baseline,
        "tokenizer.path": recipe.tokenizer.path,
    }
    return {key: start for key, start in starts.items() if isinstance(start, str)}


def source_list(source: str | tuple[str, ...] | None) -> list[str]:
    """The entries of data.train or data.test."""
    return [source] if isinstance(source, str) else list(source or ())


def data_files(source: str | tuple[str, ...] | None) -> list[str]:
    """The files among the entries of data.train or data.test."""
    paths = source_list(source)
    return [path for path in paths if path != SYNTHETIC and not path.startswith("hf://")]


def source_problems(key: str, source: str | tuple[str, ...], count: int | None) -> Iterator[str]:
    for path in source_list(source):
        if path == SYNTHETIC:
            if count is None:
                yield f"data.num_{key} is null but data.{key} is synthetic, which has no end; give a number"
        elif path.startswith("hf://"):
            if not HUB_DATA.fullmatch(path):
                yield f"data.{key} is {path!r}; use the form hf://owner/name[@config][:split][?revision=REVISION]"
        elif not storage.is_absolute(path):
            yield f"data.{key} is {path!r}, a relative path; {ABSOLUTE}"
        elif not path.endswith(SUFFIXES):
            yield f"data.{key} is {path!r}; its name must end in one of {', '.join(SUFFIXES)}"


def checkpoint_problems(key: str, start: str) -> Iterator[str]:
    """Yield a message when a checkpoint is neither an absolute path, a URI nor a hub id."""
    if storage.is_absolute(start):
        return
    if start.lower() in ("yes", "no", "on", "off"):
        yield f"{key} is {start!r}, which is a text here; write true or false"
    elif not is_hub_id(start):
        yield f"{key} is {start!r}, a relative path; {ABSOLUTE}, or a hub id owner/name[@revision]"
    elif os.path.exists(start):
        yield f"{key} is {start!r}, a hub id and also a relative path here; give an absolute path if you mean the path"
