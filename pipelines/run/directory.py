"""A run directory: one sub-directory per stage, with a key that identifies what the stage was made from.

    <run>/recipe.yaml  lease-<owner>.json  <stage>/key.json  <stage>/...  <stage>/manifest.json

A stage writes key.json first and manifest.json last. With a manifest of the same key it is done. A manifest of another
key belongs to other settings; it is refused and never overwritten. Without a manifest the stage was interrupted; its
partial results are reused if their key is the same, and removed otherwise.
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
from pipelines.run.commits import hub_names, without
from pipelines.run.keys import fingerprint, key_of, recipe_values
from pipelines.run.lease import Lease
from rcd_core.errors import UserError
from rcd_core.io import storage

SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a run, and what decides whether it is done.

    function, check, report, teardown, repair: "module:function", imported when called. check takes the recipe, raises
    UserError before the first stage; report prints a summary at the end; teardown removes what outlives the job;
    repair fixes a finished result in place.
    inputs: stages whose results it reads. sections: dotted recipe keys that decide the result. outside: recipe key ->
    checkpoint or data from outside the run, also on the hub. bundles: resources of each process. always: call it even
    when done. temporary: names below the stage's directory that only an unfinished stage needs.
    """

    name: str
    function: str
    inputs: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    outside: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    bundles: tuple[dict[str, float], ...] = ()
    needs_cluster: bool = True
    always: bool = False
    temporary: tuple[str, ...] = ()
    check: str | None = None
    report: str | None = None
    teardown: str | None = None
    repair: str | None = None


def key_material(
    stage: Stage, recipe: Recipe, inputs: Mapping[str, str | None], commits: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """What a stage's key is computed from. inputs: stage -> fingerprint, None where it is not made yet.

    commits: of what the recipe names on the hub.
    """
    on_hub = hub_names(stage.outside.values())
    local = {key: path for key, value in stage.outside.items() if (path := without(value, on_hub))}
    return {
        "stage": stage.name,
        "schema": SCHEMA,
        "recipe": recipe_values(recipe, stage.sections),
        "outside": {key: fingerprint(path) for key, path in local.items()},
        "inputs": {name: inputs.get(name) for name in stage.inputs},
        **({"hub": {name: (commits or {}).get(name) for name in on_hub}} if on_hub else {}),
    }


class RunDirectory:
    """The files of a run. Writing raises UserError once the lease is lost."""

    def __init__(self, path: str, lease: Lease | None = None) -> None:
        self.path = path
        self.lease = lease

    def stage_directory(self, stage: str) -> str:
        return storage.join(self.path, stage)

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """The manifest of a finished stage, else None."""
        return self._read(stage, "manifest.json")

    def partial_key(self, stage: str) -> str | None:
        """The key of a started stage, finished or not."""
        started = self._read(stage, "key.json")
        return str(started["key"]) if started else None

    def commits(self, stage: str) -> dict[str, str | None]:
        """Commits that a started stage has stored, by the name of what it reads from the hub."""
        material = (self._read(stage, "key.json") or {}).get("material") or {}
        return dict(material.get("hub", {}))

    def write_recipe(self, recipe: Recipe) -> None:
        self._check()
        storage.write_bytes(storage.join(self.path, "recipe.yaml"), dump_recipe(recipe).encode())

    def remove_stage(self, stage: str) -> None:
        """Remove the manifest first, so that a killed removal does not leave a stage that looks finished."""
        self._check()
        storage.remove(storage.join(self.stage_directory(stage), "manifest.json"))
        storage.remove(self.stage_directory(stage))

    def begin(self, stage: str, material: Mapping[str, Any]) -> None:
        """Prepare a stage's directory for the key of `material`; partial results of another key are removed."""
        self._check()
        key = key_of(material)
        if self.partial_key(stage) != key:
            self.remove_stage(stage)
        storage.write_json(storage.join(self.stage_directory(stage), "key.json"), {"key": key, "material": material})

    def finish(
        self, stage: str, material: Mapping[str, Any], summary: dict[str, Any], started: datetime, seconds: float
    ) -> dict[str, Any]:
        """Write the manifest, which marks the stage as done."""
        self._check()
        key = key_of(material)
        manifest = {
            "schema": SCHEMA,
            "stage": stage,
            "key": key,
            # For the keys of dependent stages: a hash of the content where the stage gives one, else its own key.
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
        """Replace the summary of a finished stage. Key and fingerprint stay, so dependent stages remain done."""
        self._check()
        manifest = {**(self.manifest(stage) or {}), "summary": summary}
        storage.write_json(storage.join(self.stage_directory(stage), "manifest.json"), manifest)

    def _read(self, stage: str, name: str) -> dict[str, Any] | None:
        try:
            content = storage.read_json(storage.join(self.stage_directory(stage), name))
        except FileNotFoundError:
            return None
        return content if isinstance(content, dict) else None

    def _check(self) -> None:
        if self.lease:
            self.lease.check()


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """Argument of a stage function, which writes below `directory` and returns the summary."""

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
        """The directory of an input stage."""
        self.input(name)
        return self.run.stage_directory(name)

    def checkpoint(self, name: str) -> str:
        """The model of an input stage: its model/ directory, or the external checkpoint that it uses."""
        external = self.input(name)["summary"].get("checkpoint")
        # The recipe has it at its commit, a manifest of an older release does not.
        return str(external and self.recipe.checkpoint(name) or external or storage.join(self.input_dir(name), "model"))

    def residual_temperature(self, name: str) -> float | None:
        """T_res of the model of an input stage: what the stage calibrate chose, 1 without it; of an external
        checkpoint None, which means its own. A file next to a trained model may be of an earlier calibration."""
        if self.recipe.checkpoint(name) is not None:
            return None
        chosen = self.input("calibrate")["summary"]["residual_temperatures"] if "calibrate" in self.inputs else {}
        return float(chosen.get(name, 1.0))


def use_checkpoint(context: StageContext) -> dict[str, Any]:
    """Stage function for a recipe that gives an existing checkpoint, or stage base's model, instead of a training."""
    return {"checkpoint": context.recipe.checkpoint(context.stage) or context.checkpoint("base")}


def resolve(function: str) -> Callable[[Any], Any]:
    """ "module:function" -> the function."""
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)


def run_stage(stage: Stage, context: StageContext, material: Mapping[str, Any]) -> dict[str, Any]:
    """Call a stage, write its manifest and return it. A failure leaves the partial results in place."""
    context.run.begin(stage.name, material)
    started, clock = datetime.now().astimezone(), time.monotonic()
    summary = resolve(stage.function)(context)
    manifest = context.run.finish(stage.name, material, summary, started, time.monotonic() - clock)
    remove_temporary(stage, context.run)
    return manifest


def remove_temporary(stage: Stage, run: RunDirectory) -> None:
    """Of a stage whose manifest stands."""
    for name in stage.temporary:
        storage.remove(storage.join(run.stage_directory(stage.name), name))
