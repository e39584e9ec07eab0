"""The stages of a recipe with their inputs and recipe keys, in running order.

    prepare -> base -> reference -> signals -> target, target-<variant>, baseline, baseline-<name> -> calibrate
        -> evaluate -> deploy

After prepare, a stage prepare-<name> per entry of evaluate.tasks makes its problems.

With target.rounds: signals -> round-1 -> signals-2 -> round-2 -> ... -> target.

Stage files are named, not imported, so that a skipped stage costs nothing.
"""

from __future__ import annotations

from dataclasses import fields

from pipelines.recipe.model import Recipe, ReferenceStage
from pipelines.recipe.rules import reference_keys
from pipelines.recipe.sources import SYNTHETIC, source_list
from pipelines.run.directory import Stage
from rcd_core.families.config import ModelConfig
from rcd_core.training.settings import ResidualSettings, SignalRule

TEMPORARY = ("ray", "exported.json")  # checkpoints of a training, and the mark that its model is written
_TRAINING = ("block_length", "noise", "seed", "deterministic")


def stages_of(recipe: Recipe) -> dict[str, Stage]:
    """Stage name -> Stage, in running order."""
    using_reference = set(reference_keys(recipe).values())
    stages = [
        _prepare(recipe),
        # Long before evaluate, which reads them: bad data should not be found after days of training.
        *(_prepare_task(recipe, name) for name in recipe.evaluate.tasks),
        *([_base(recipe)] if recipe.base else []),
        *([_reference(recipe, recipe.reference)] if recipe.reference and using_reference else []),
        *([_signals(recipe)] if any(r.source == "signals" for r in recipe.residuals().values()) else []),
        *_rounds(recipe),
        _target(recipe, "target", "target.residual", recipe.target.residual),
        *(_target(recipe, f"target-{name}", f"variants.{name}", r) for name, r in recipe.variants.items()),
        *([_target(recipe, "baseline")] if recipe.baseline else []),
        *(_target(recipe, f"baseline-{name}", train=f"baselines.{name}") for name in recipe.baselines),
    ]
    models = tuple(stage.name for stage in stages if stage.name.startswith(("target", "baseline")))
    stages += [_calibrate(recipe, models)] if recipe.calibrate else []
    return {
        stage.name: stage
        for stage in [*stages, _evaluate(recipe, models, using_reference), _deploy(recipe, using_reference)]
    }


def _prepare(recipe: Recipe) -> Stage:
    sources = {"data.train": source_list(recipe.data.train), "data.test": source_list(recipe.data.test)}
    files = {key: tuple(name for name in names if name != SYNTHETIC) for key, names in sources.items()}
    tokenizer = _outside("tokenizer.path", recipe.tokenizer.path)
    converted: tuple[str, ...] = ()
    if recipe.base and recipe.base.convert:
        converted = ("base.start", "base.convert.mask_token")
        if recipe.tokenizer.path is None:
            tokenizer = _outside("base.start", recipe.base.start)
    return Stage(
        name="prepare",
        function="pipelines.prepare:run",
        sections=("data", "tokenizer", "block_length", "seed", *converted),
        outside={**{key: paths for key, paths in files.items() if paths}, **tokenizer},
        check="pipelines.data.sources:check_early",
        bundles=({"CPU": 1.0},),
    )


def _prepare_task(recipe: Recipe, name: str) -> Stage:
    """The problems of one of evaluate.tasks: a stage of its own, so that a new task changes no other stage's key."""
    key, task = f"evaluate.tasks.{name}", recipe.evaluate.tasks[name]
    files = tuple(source for source in source_list(task.test) if source != SYNTHETIC)
    length = f"{key}.max_length" if task.max_length else "data.max_length"
    own = tuple(f"{key}.{field}" for field in ("task", "test", "num_test", "fields"))
    return Stage(
        name=f"prepare-{name}",
        function="pipelines.prepare:run_task",
        inputs=("prepare",),
        sections=(*own, length, "data.reasoning", "seed"),
        outside={f"{key}.test": files} if files else {},
        check="pipelines.data.sources:check_tasks",
        bundles=({"CPU": 1.0},),
    )


def _base(recipe: Recipe) -> Stage:
    return Stage(
        name="base",
        function="pipelines.train:run",
        temporary=TEMPORARY,
        inputs=("prepare",),
        sections=("base", *_TRAINING),
        outside=_outside("base.start", recipe.base.start if recipe.base else None),
        bundles=_workers(recipe, "base", recipe.resources.worker_counts[0]),
    )


def _reference(recipe: Recipe, reference: ReferenceStage) -> Stage:
    outside = _outside("reference.start", reference.start)
    base = ("base",) if reference.start is None else ()
    if reference.train is None:
        return _checkpoint("reference", "reference", outside, base)
    return Stage(
        name="reference",
        function="pipelines.train:run",
        temporary=TEMPORARY,
        inputs=("prepare", *base),
        sections=("reference", *_TRAINING),
        outside=outside,
        bundles=_workers(recipe, "reference", recipe.resources.worker_counts[0]),
    )


def _rounds(recipe: Recipe) -> list[Stage]:
    """The parts of the target's training before the last one, and the signals behind each."""
    stages = []
    for number in range(1, recipe.target.rounds):
        stages.append(_target(recipe, f"round-{number}", "target.residual", recipe.target.residual))
        stages.append(_signals(recipe, f"signals-{number + 1}", f"round-{number}", ("target.residual", "target.train")))
    return stages


def _signals(
    recipe: Recipe, name: str = "signals", reference: str = "reference", sections: tuple[str, ...] = ()
) -> Stage:
    return Stage(
        name=name,
        function="pipelines.precompute:run",
        inputs=("prepare", reference),
        # The number of rows that the targets train on.
        sections=(
            *("signals", *(f"target.train.{n}" for n in ("steps", "epochs", "batch_size")), "target.rounds"),
            *(*_TRAINING, *sections),
        ),
        bundles=_workers(recipe, name, 1),  # the pool starts with the actors that fit
        repair="pipelines.precompute:repair",
    )


def _target(
    recipe: Recipe,
    name: str,
    section: str | None = None,
    residual: ResidualSettings | None = None,
    train: str = "target.train",
) -> Stage:
    """A target, or a baseline, which trains without a residual. section, train: keys of the two settings."""
    key = "baseline" if name == "baseline" else "target.start"
    if (start := recipe.checkpoint(name)) is not None:
        return _checkpoint(name, key, _outside(key, start))
    source = residual.source if residual else "none"
    sources: tuple[str, ...] = {"signals": ("signals",), "online": ("reference",)}.get(source, ())
    distilled = ("reference",) if recipe.training(name).train.distill else ()
    number = recipe.round_of(name)
    if number is not None and number > 1:
        sources = (f"signals-{number}", f"round-{number - 1}")
    inputs = tuple(dict.fromkeys((*sources, *distilled)))
    rule = tuple(f"signals.{f.name}" for f in fields(SignalRule)) if source == "online" else ()
    return Stage(
        name=name,
        function="pipelines.train:run",
        temporary=TEMPORARY if number in (None, recipe.target.rounds) else TEMPORARY[1:],  # the next round resumes
        inputs=("prepare", *inputs, *(("base",) if recipe.target.start is None else ())),
        sections=(
            *("target.start", train, *((section,) if section else ()), *rule, *_TRAINING),
            *(("target.rounds",) if number is not None else ()),
        ),
        outside=_outside("target.start", recipe.target.start),
        bundles=_workers(recipe, name, recipe.resources.worker_counts[0]),
    )


def _checkpoint(name: str, section: str, outside: dict[str, str], inputs: tuple[str, ...] = ()) -> Stage:
    """A checkpoint from outside the run, or the model of an input, used unchanged."""
    return Stage(
        name=name,
        function="pipelines.run.directory:use_checkpoint",
        inputs=inputs,
        sections=(section,),
        outside=outside,
        needs_cluster=False,
    )


def _calibrate(recipe: Recipe, models: tuple[str, ...]) -> Stage:
    inspected = tuple(name for name in models if name == "baseline" or name.startswith("target"))
    trained_on_reference = any(residual.source in ("signals", "online") for residual in recipe.residuals().values())
    temperatures = tuple(f"signals.{name}_temperature" for name in ("alpha", "delta"))
    return Stage(
        name="calibrate",
        function="pipelines.calibrate:run",
        inputs=("prepare", *inspected, *(("reference",) if trained_on_reference else ())),
        sections=("calibrate", "block_length", "noise", "data.task", "seed", "deterministic", *temperatures),
        bundles=_workers(recipe, "calibrate", min(recipe.resources.evaluate_actors, len(inspected))),
        report="pipelines.calibrate:report",
    )


def _evaluate(recipe: Recipe, models: tuple[str, ...], using_reference: set[str]) -> Stage:
    base = ("base",) if any(arm.model == "base" for arm in recipe.evaluate.arms.values()) else ()
    # How a target was trained is part of its stage's key; of one from outside the recipe says whether it is RCD.
    other = recipe.checkpoint("target") is not None and not recipe.target.residual.has_alpha
    outside = ("target.residual.source",) if other else ()
    return Stage(
        name="evaluate",
        function="pipelines.evaluate:run",
        temporary=("parts", *(f"parts-{name}" for name in recipe.evaluate.tasks)),
        inputs=(
            "prepare",
            *(f"prepare-{name}" for name in recipe.evaluate.tasks),
            *base,
            *models,
            *_calibrated(recipe),
            *(("reference",) if "evaluate" in using_reference else ()),
        ),
        sections=("evaluate", "block_length", "data.task", "data.test_task", "seed", "deterministic", *outside),
        bundles=_workers(recipe, "evaluate", recipe.resources.evaluate_actors * recipe.resources.tensor_parallel),
        report="pipelines.evaluate:report",
    )


def _deploy(recipe: Recipe, using_reference: set[str]) -> Stage:
    reference = ("reference",) if "deploy" in using_reference else ()
    baseline = ("baseline",) if recipe.deploy.baseline else ()
    return Stage(
        name="deploy",
        function="pipelines.serve:run",
        inputs=("prepare", "target", *_calibrated(recipe), *reference, *baseline),
        sections=("deploy", "block_length", "data.task", "data.test_task", "signals.top_k", "deterministic"),
        outside={
            key: checkpoint
            for model_id, model in recipe.deploy.models.items()
            for key, checkpoint in _outside(f"deploy.models.{model_id}.checkpoint", model.checkpoint).items()
        },
        always=True,  # the application may have been removed
        check="pipelines.serving.api_keys:check",
        report="pipelines.serve:report",
        teardown="pipelines.serve:teardown",
    )


def _calibrated(recipe: Recipe) -> tuple[str, ...]:
    """Stage calibrate as an input, because it writes T_res into the checkpoints."""
    return ("calibrate",) if recipe.calibrate else ()


def _outside(key: str, start: str | ModelConfig | None) -> dict[str, str]:
    """A checkpoint whose files, or whose commit on the hub, enter the key."""
    return {key: start} if isinstance(start, str) else {}


def _workers(recipe: Recipe, stage: str, count: int) -> tuple[dict[str, float], ...]:
    return (recipe.resources.worker_bundle(stage),) * count
