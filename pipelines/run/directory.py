"""A run: one directory, one sub-directory per stage, and for each stage a key that says what it was made from.

    <run>/recipe.yaml  lease.json  <stage>/key.json  <stage>/...  <stage>/manifest.json

key.json is written when a stage starts, manifest.json as its last act. A stage with a manifest of the same key is
done; a manifest of another key is somebody's result and is refused, never overwritten; no manifest means the stage
was interrupted, and its partial results are used again if they have the same key and removed otherwise.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from rich.console import Console

from pipelines.recipe.load import dump_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.keys import fingerprint, key_of, recipe_values
from pipelines.run.lease import Lease
from rcd_core.errors import UserError
from rcd_core.io import storage

SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a run, and all that decides whether it is done.

    function: "module:function", imported only when called; report prints what the user wants to see at the end,
    teardown removes what outlives the job, repair mends a finished result in place. sections: dotted recipe keys that
    decide the result. outside: recipe key -> checkpoint or data files from outside the run. bundles: what must fit the
    cluster, one mapping per process.
    always: called even when done, and free to find that nothing is to do.
    """

    name: str
    function: str
    inputs: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    outside: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    bundles: tuple[dict[str, float], ...] = ()
    needs_cluster: bool = True
    always: bool = False
    report: str | None = None
    teardown: str | None = None
    repair: str | None = None


def key_material(stage: Stage, recipe: Recipe, inputs: Mapping[str, str | None]) -> dict[str, Any]:
    """All that a stage's key is made of. inputs: stage -> its fingerprint, None where it has yet to be made."""
    return {
        "stage": stage.name,
        "schema": SCHEMA,
        "recipe": recipe_values(recipe, stage.sections),
        "outside": {key: fingerprint(path) for key, path in stage.outside.items()},
        "inputs": {name: inputs.get(name) for name in stage.inputs},
    }


class RunDirectory:
    """The files of a run. Writes need the lease, where one was taken."""

    def __init__(self, path: str, lease: Lease | None = None) -> None:
        self.path = path
        self.lease = lease

    def stage_directory(self, stage: str) -> str:
        return storage.join(self.path, stage)

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """The manifest of a finished stage, None when it is not finished."""
        return self._read(stage, "manifest.json")

    def partial_key(self, stage: str) -> str | None:
        """The key of an attempt that has begun, finished or not."""
        started = self._read(stage, "key.json")
        return str(started["key"]) if started else None

    def write_recipe(self, recipe: Recipe) -> None:
        self._check()
        storage.write_bytes(storage.join(self.path, "recipe.yaml"), dump_recipe(recipe).encode())

    def remove_stage(self, stage: str) -> None:
        """Manifest first: what a kill leaves half removed must not look finished."""
        self._check()
        storage.remove(storage.join(self.stage_directory(stage), "manifest.json"))
        storage.remove(self.stage_directory(stage))

    def begin(self, stage: str, material: Mapping[str, Any]) -> None:
        """Open a stage's directory for the key of `material`, keeping partial results of that key only."""
        self._check()
        key = key_of(material)
        if self.partial_key(stage) != key:
            self.remove_stage(stage)
        storage.write_json(storage.join(self.stage_directory(stage), "key.json"), {"key": key, "material": material})

    def finish(
        self, stage: str, material: Mapping[str, Any], summary: dict[str, Any], started: datetime, seconds: float
    ) -> dict[str, Any]:
        """Write the manifest, by which the stage is done."""
        self._check()
        key = key_of(material)
        manifest = {
            "schema": SCHEMA,
            "stage": stage,
            "key": key,
            # What the stages after this one are made from: its content if it says what that is, else its recipe.
            "fingerprint": key_of(summary["fingerprint"]) if "fingerprint" in summary else key,
            "material": dict(material),
            "summary": summary,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        storage.write_json(storage.join(self.stage_directory(stage), "manifest.json"), manifest)
        return manifest

    def replace_summary(self, stage: str, summary: dict[str, Any]) -> None:
        """Put another summary into a finished stage's manifest. Key and fingerprint stay, and so does what was made
        from it: a shard computed again holds the same rows, on another kind of device with another rounding."""
        self._check()
        manifest = {**(self.manifest(stage) or {}), "summary": summary}
        storage.write_json(storage.join(self.stage_directory(stage), "manifest.json"), manifest)

    def _read(self, stage: str, name: str) -> dict[str, Any] | None:
        try:
            found = storage.read_json(storage.join(self.stage_directory(stage), name))
        except FileNotFoundError:
            return None
        return found if isinstance(found, dict) else None

    def _check(self) -> None:
        if self.lease:
            self.lease.check()


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What a stage function gets. It writes below `directory` and returns its summary."""

    recipe: Recipe
    run: RunDirectory
    stage: str
    key: str
    inputs: tuple[str, ...]
    console: Console
    verbose: bool = False

    @property
    def directory(self) -> str:
        return self.run.stage_directory(self.stage)

    def input(self, name: str) -> dict[str, Any]:
        """The manifest of an input stage."""
        if name not in self.inputs:
            raise LookupError(f"stage {self.stage} has no input {name!r}; its inputs are {', '.join(self.inputs)}")
        manifest = self.run.manifest(name)
        if manifest is None:
            raise UserError(f"stage {self.stage} needs stage {name}, which is not done in {self.run.path}")
        return manifest

    def input_dir(self, name: str) -> str:
        self.input(name)
        return self.run.stage_directory(name)

    def checkpoint(self, name: str) -> str:
        """The model of an input stage: its model/ directory, or the checkpoint from outside that stands for it."""
        return str(self.input(name)["summary"].get("checkpoint") or storage.join(self.input_dir(name), "model"))


def use_checkpoint(context: StageContext) -> dict[str, Any]:
    """The stage function where a recipe names an existing checkpoint instead of training one."""
    return {"checkpoint": context.recipe.checkpoint(context.stage)}


def resolve(function: str) -> Callable[[StageContext], Any]:
    """ "module:function" -> the function."""
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)


def run_stage(stage: Stage, context: StageContext, material: Mapping[str, Any]) -> dict[str, Any]:
    """Call a stage and write its manifest, which is returned. A failure leaves the partial results in place."""
    context.run.begin(stage.name, material)
    started, clock = datetime.now().astimezone(), time.monotonic()
    summary = resolve(stage.function)(context)
    return context.run.finish(stage.name, material, summary, started, time.monotonic() - clock)
