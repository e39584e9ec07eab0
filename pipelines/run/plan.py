"""The plan of a job: which stages run, which are done, and which block it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

from pipelines.recipe.files import suggestion
from pipelines.recipe.model import Recipe
from pipelines.run.commits import Commits
from pipelines.run.directory import RunDirectory, Stage, key_material
from pipelines.run.keys import differences, key_of
from rcd_core.errors import UserError


@dataclass(frozen=True)
class Decision:
    """What happens to one stage. "open": done before, but valid only if its inputs turn out the same."""

    stage: Stage
    action: Literal["run", "skip", "open", "refuse"]
    why: str
    material: dict[str, Any]
    manifest: dict[str, Any] | None = None
    differing: tuple[str, ...] = ()


def make_plan(
    recipe: Recipe,
    stages: Mapping[str, Stage],
    run: RunDirectory,
    redo: Collection[str] = (),
    commits: Commits | None = None,
) -> dict[str, Decision]:
    """Compare every stage's key with its manifest. Writes and raises nothing; see `require_runnable`."""
    known: dict[str, str | None] = {}
    plan = {}
    for name, stage in stages.items():
        decision = decide(recipe, stage, run, known, redo, commits)
        done = decision.action == "skip" and decision.manifest is not None
        known[name] = decision.manifest["fingerprint"] if done and decision.manifest else None
        plan[name] = decision
    return plan


def decide(
    recipe: Recipe,
    stage: Stage,
    run: RunDirectory,
    inputs: Mapping[str, str | None],
    redo: Collection[str] = (),
    commits: Commits | None = None,
) -> Decision:
    """The decision for one stage. inputs: fingerprints of its input stages, None where one is not made yet."""
    material = key_material(stage, recipe, inputs, commits)
    manifest = run.manifest(stage.name)
    if stage.name in redo:
        return Decision(stage, "run", "requested by --redo", material)
    if manifest is None:
        partial = run.partial_key(stage.name)
        if partial is None:
            return Decision(stage, "run", "not done yet", material)
        same = partial == key_of(material)
        return Decision(
            stage, "run", "was interrupted, " + ("resumes" if same else "starts again with other settings"), material
        )
    differing = tuple(differences(manifest["material"], material))
    if stage.always:
        return Decision(stage, "run", "always checked" if not differing else differing[0], material, manifest)
    if differing:
        return Decision(stage, "refuse", "; ".join(differing), material, manifest, differing)
    if None in material["inputs"].values():
        return Decision(stage, "open", "done before; depends on its new inputs", material, manifest)
    return Decision(stage, "skip", f"done, took {manifest['seconds']:.1f} s", material, manifest)


def ancestors(stages: Mapping[str, Stage], name: str) -> list[str]:
    """The stages that `name` depends on, directly or not, in running order."""
    above = {name}
    for other in reversed(list(stages.values())):
        if other.name in above:
            above |= set(other.inputs)
    return [n for n in stages if n in above and n != name]


def with_dependents(stages: Mapping[str, Stage], names: Collection[str]) -> list[str]:
    """`names` and every stage that depends on them, in running order."""
    return [n for n in stages if n in names or any(a in names for a in ancestors(stages, n))]


def select_stages(stages: Mapping[str, Stage], patterns: Collection[str], option: str) -> list[str]:
    """The stages that match names or patterns such as target*, in running order. option: for the error."""
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in stages):
            raise UserError(
                f"{option}: stage {pattern!r} is not in this recipe{suggestion(pattern, list(stages))}; "
                f"its stages are {', '.join(stages)}"
            )
    return [name for name in stages if any(fnmatch(name, pattern) for pattern in patterns)]


def require_runnable(
    stages: Mapping[str, Stage],
    plan: Mapping[str, Decision],
    chosen: Collection[str],
    run: RunDirectory,
    keep: str = "--set name=NAME starts another run",
) -> None:
    """Raise UserError when a stage holds results of other settings, or an input is neither done nor chosen.

    keep: what to do to keep the old results."""
    needed = {a for name in chosen for a in ancestors(stages, name)} | set(chosen)
    refused = [name for name in stages if name in needed and plan[name].action == "refuse"]
    if refused:
        # --redo repeats dependent stages as well: naming the first ones is enough.
        first = [name for name in refused if not set(ancestors(stages, name)) & set(refused)]
        lines = [f"  {name}: {line}" for name in refused for line in plan[name].differing]
        redo = " ".join(f"--redo {name}" for name in first)
        also = ", ".join(name for name in with_dependents(stages, first) if name in chosen and name not in first)
        raise UserError(
            "\n".join([f"{run.path} holds results of other settings:", *lines])
            + f"\nTo replace them: {redo}{f' (also repeats {also})' if also else ''}. "
            f"To keep them: {keep}. Or restore the old settings."
        )
    for name in chosen:
        absent = [a for a in stages[name].inputs if a not in chosen and plan[a].action != "skip"]
        if absent:
            raise UserError(
                f"stage {name} needs {', '.join(absent)}, which {run.path} does not hold; "
                f"add to --stages: {','.join(absent)}"
            )
