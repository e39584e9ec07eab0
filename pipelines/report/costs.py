"""What the models of an evaluation cost to train: wall-clock seconds of their stages, steps, tokens and FLOPs.

Seconds, steps and examples are those of the manifests. FLOPs are the planner's formula at the counted tokens: 6 per
parameter and token, 2 per additional forward pass (rcd_core.training.plan).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.recipe.model import Recipe
from pipelines.report.text import Cells, Results, titles
from pipelines.run.directory import RunDirectory
from pipelines.run.plan import ancestors
from pipelines.run.stages import stages_of
from rcd_core.errors import UserError
from rcd_core.families.loading import family_of
from rcd_core.io import storage
from rcd_core.training.costs import extra_forwards, forward_flops
from rcd_core.training.plan import ModelShape

Costs = dict[str, Any]
NOTE = (
    "Wall-clock seconds of the job that finished a stage, its start-up included; earlier jobs that were interrupted do "
    "not count. Tokens: of the training examples, as the stage prepare counted them. FLOPs: 6 per parameter and token, "
    "2 per additional forward pass; a formula, not a measurement, and without the calibration's. Every method also "
    "needs the base. A stage that several methods share counts for each."
)


def training_costs(recipe: Recipe, run: RunDirectory, methods: Mapping[str, Sequence[str]]) -> Costs | None:
    """The entry `costs` of results.json: figures by stage, and the stages behind each method.

    methods: method -> stages whose results it decodes with. None if the run trained none of them.
    """
    stages = stages_of(recipe)
    behind: dict[str, list[str]] = {}
    for method, used in methods.items():
        models = [name for name in used if name != "calibrate"]  # which looks at the other models of a run as well
        needed = {a for name in models for a in (*ancestors(stages, name), name)} | ({"calibrate"} & set(used))
        behind[method] = [name for name in stages if name in needed and not name.startswith("prepare")]
    found = {name: _stage(recipe, run, name) for name in stages if any(name in names for names in behind.values())}
    if not any(cost and cost["steps"] for cost in found.values()):
        return None
    return {"stages": {name: cost for name, cost in found.items() if cost}, "methods": behind}


def _stage(recipe: Recipe, run: RunDirectory, name: str) -> dict[str, Any] | None:
    """None for a checkpoint from outside, whose training is unknown."""
    manifest, prepared = run.manifest(name), run.manifest("prepare")
    if manifest is None or "checkpoint" in manifest["summary"]:
        return None
    cost: dict[str, Any] = {"seconds": manifest["seconds"], "steps": None, "tokens": None, "flops": None}
    summary, shape = manifest["summary"], _shape(run, name)
    if name.startswith("signals"):
        maker = next((s for s in manifest["material"]["inputs"] if s != "prepare"), "reference")
        cost["tokens"], shape = summary["tokens"], _shape(run, maker)
        if shape:
            passes = 1 if name == "signals" else 2  # the target's own come after a pass over a still noisier version
            cost["flops"] = passes * forward_flops(shape, summary["tokens"], summary["masked_tokens"])
    elif "steps" in summary:
        cost |= _training(recipe, run, name, summary["steps"], (prepared or {}).get("summary", {}).get("chunks"), shape)
    return cost


def _training(
    recipe: Recipe, run: RunDirectory, name: str, steps: int, chunks: Mapping[str, Any] | None, shape: ModelShape | None
) -> dict[str, Any]:
    training, number = recipe.training(name), recipe.round_of(name)
    if number is not None and number > 1:  # its optimiser goes on where the last round stopped
        ends = recipe.target.round_ends(training.train.resolved(sum(chunks["rows"]) if chunks else 0).steps)
        steps -= ends[number - 2]
    if not chunks or not sum(chunks["rows"]):
        return {"steps": steps}
    rows, each = steps * training.train.batch_size, 1 / sum(chunks["rows"])
    tokens, labelled = (rows * sum(chunks[what]) * each for what in ("tokens", "labelled"))
    if shape is None:
        return {"steps": steps, "tokens": round(tokens)}
    reference = _shape(run, "reference")
    share = reference.parameters / shape.parameters if reference else 0.0
    extra = extra_forwards(training.residual, training.train.distill, share)
    return {"steps": steps, "tokens": round(tokens), "flops": (3 + extra) * forward_flops(shape, tokens, labelled / 2)}


def _shape(run: RunDirectory, stage: str) -> ModelShape | None:
    """Of the model that a stage made, or uses unchanged; None if it is not known."""
    used = (run.manifest(stage) or {"summary": {}})["summary"].get("checkpoint")
    path = storage.join(used or storage.join(run.stage_directory(stage), "model"), "config.json")
    try:
        config, directory = storage.read_json(path), Path(path).parent
        family = family_of(config, directory)
        return ModelShape.of_backbone(family.family, family.read_config(config, directory, True))  # type: ignore[arg-type]
    except (OSError, UserError, KeyError, ValueError):  # a figure less in the report
        return None


# -- words


def beyond_base(results: Results, method: str) -> tuple[float, float | None] | None:
    """(seconds, FLOPs) of a method's stages other than the base, which all models share; None if unknown."""
    costs = results.get("costs")
    if not costs or method not in costs["methods"]:
        return None
    own = [name for name in costs["methods"][method] if name != "base"]
    if any(name not in costs["stages"] for name in own if name != "reference"):
        return None
    found = [costs["stages"][name] for name in own if name in costs["stages"]]
    flops = [cost["flops"] for cost in found if cost["flops"] is not None]
    return sum(cost["seconds"] for cost in found), sum(flops) if flops else None


def by_stage(results: Results) -> Cells:
    rows = [
        [name, *(_amount(cost[what]) for what in ("seconds", "steps", "tokens")), as_flops(cost["flops"])]
        for name, cost in results["costs"]["stages"].items()
    ]
    return ["stage", "wall-clock, s", "steps", "tokens", "FLOPs, by formula"], rows


def by_method(results: Results) -> Cells:
    """What each method took beyond the base, and that over its baseline's."""
    names, rows = titles(results), []
    baselines = {m["name"]: m["baseline"] for m in results["arms"]}
    for method, stages in results["costs"]["methods"].items():
        own, base = beyond_base(results, method), beyond_base(results, baselines.get(method) or "")
        listed = ", ".join(name for name in stages if name != "base")
        rows.append([names[method], listed, *_sums(own), *_ratios(own, base)])
    head = ["method", "stages beyond the base", "wall-clock, s", "FLOPs, by formula"]
    return [*head, "wall-clock over the baseline's", "FLOPs over the baseline's"], rows


def _sums(own: tuple[float, float | None] | None) -> Iterator[str]:
    yield "not known" if own is None else f"{own[0]:,.0f}"
    yield "not known" if own is None else as_flops(own[1])


def _ratios(own: tuple[float, float | None] | None, base: tuple[float, float | None] | None) -> Iterator[str]:
    for i in (0, 1):
        one, other = own and own[i], base and base[i]
        yield f"{one / other:.2f}" if one and other else ""


def _amount(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def as_flops(value: float | None) -> str:
    return "not known" if value is None else f"{value:.1e}".replace("e+", "e")
