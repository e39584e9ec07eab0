"""`rcd train plan`: what the trainings of a recipe need under every strategy, before any GPU is used. The parts that
`rcd plan` and `rcd fit` need as well."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.table import Table

from pipelines.cli.plan_flags import PlanFlags, SignalsPlanFlags, TrainPlanFlags
from pipelines.recipe.load import load_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.directory import RunDirectory
from pipelines.run.messages import make_console
from pipelines.run.progress import duration
from rcd_core.errors import UserError
from rcd_core.families.config import ModelConfig
from rcd_core.families.convert import convertible
from rcd_core.families.files import read_json
from rcd_core.families.loading import checkpoint_directory, family_of
from rcd_core.io.hub import is_hub_id, split_hub_id
from rcd_core.training.costs import TrainingCost, extra_forwards, training_cost
from rcd_core.training.disk import most_bytes
from rcd_core.training.plan import FP32, MEMORY, USABLE, Memory, ModelShape, fits, memory, step_shape
from rcd_core.training.settings import ResidualSettings, TrainSettings

MAX_GPUS = 1024
CHECKPOINTING: tuple[bool | Literal["selective"], ...] = (False, "selective", True)
PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "signals")


@dataclass(frozen=True)
class Strategy:
    """A strategy to compare, and the settings that select it."""

    name: str
    settings: dict[str, Any]

    def apply(self, settings: TrainSettings) -> TrainSettings:
        changes: dict[str, Any] = {"deepspeed": {}, "cpu_offload": False, "shard_size": None} | self.settings
        return replace(settings, **changes)


STRATEGIES = (
    Strategy("ddp", {"strategy": "ddp"}),
    Strategy("fsdp2", {"strategy": "fsdp2"}),
    Strategy("fsdp2, offload", {"strategy": "fsdp2", "cpu_offload": True}),
    *(
        Strategy(f"deepspeed {stage}", {"strategy": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}})
        for stage in (1, 2, 3)
    ),
    Strategy(
        "deepspeed 3, offload",
        {
            "strategy": "deepspeed",
            "deepspeed": {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu"},
                    "offload_param": {"device": "cpu"},
                }
            },
        },
    ),
)


def plan_training(flags: TrainPlanFlags) -> int:
    check_flags(flags)
    recipe = load_recipe(flags.recipe, flags.set)
    console = make_console()
    gpus = flags.gpus or recipe.resources.worker_counts[-1]
    rows = rows_of(recipe, flags)
    jobs = list(jobs_of(recipe, flags.vocab_size))
    if not jobs:
        raise UserError(f"recipe {recipe.name} trains nothing, so there is nothing to plan")
    for job in jobs:
        if job.name.startswith(("target-", "baseline")):  # as the target
            continue
        _show(job, recipe, rows, gpus, flags, console)
    return 0


def check_flags(flags: TrainPlanFlags | PlanFlags) -> None:
    if not 0 < flags.mfu <= 1:
        raise UserError(f"--mfu is {flags.mfu}; it must be in (0, 1]")
    for name in ("gpus", "examples", "example_tokens", "vocab_size"):
        value = getattr(flags, name)
        if value is not None and not 1 <= value < math.inf:
            raise UserError(f"--{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class Job:
    """One training of the recipe. forwards: additional passes over each row, in forward passes of the trained model."""

    name: str
    shape: ModelShape
    settings: TrainSettings
    residual: ResidualSettings | None
    forwards: float


@dataclass(frozen=True)
class Rows:
    """Training examples: number, mean length in tokens, share of labelled tokens."""

    examples: int | None
    mean_tokens: float
    labelled_share: float
    source: str


def jobs_of(recipe: Recipe, vocab_size: int | None) -> Iterator[Job]:
    """Every training of the recipe, in running order."""
    reference = recipe.reference
    if recipe.base:
        shape = shape_of("base.start", recipe.base.start, recipe, vocab_size)
        yield Job("base", shape, recipe.base.train, None, 0.0)
    smaller = None
    online = any(r.source == "online" for r in recipe.residuals().values())
    online = online or bool(recipe.target.train and recipe.target.train.distill)
    if reference is not None and (reference.train or online):
        first = reference.start or (recipe.base.start if recipe.base else None)
        assert first is not None  # a rule of the recipe
        smaller = shape_of("reference.start", first, recipe, vocab_size)
        if reference.train:
            yield Job("reference", smaller, reference.train, None, 0.0)
    if recipe.target.train is None:
        return
    start = recipe.target.start or (recipe.base.start if recipe.base else None)
    assert start is not None  # a rule of the recipe
    shape = shape_of("target.start", start, recipe, vocab_size)
    for stage in ("target", *(f"target-{name}" for name in recipe.variants)):
        training = recipe.training(stage)
        residual = training.residual
        assert residual is not None  # of a target
        share = smaller.parameters / shape.parameters if smaller is not None else 0.0
        forwards = extra_forwards(residual, training.train.distill, share)
        yield Job(stage, shape, training.train, residual, forwards)
    for stage in (*(["baseline"] if recipe.baseline is True else []), *(f"baseline-{n}" for n in recipe.baselines)):
        yield Job(stage, shape, recipe.training(stage).train, None, 0.0)


def shape_of(key: str, start: str | ModelConfig, recipe: Recipe, vocab_size: int | None) -> ModelShape:
    """From sizes in the recipe, or from a checkpoint's config.json; nothing is downloaded. key: names it in errors."""
    if isinstance(start, ModelConfig):
        return ModelShape.of(start, vocab_size or vocabulary_of(recipe))
    if "://" not in start and not Path(start).is_dir() and is_hub_id(start):
        from huggingface_hub import try_to_load_from_cache

        name, revision = split_hub_id(start)
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(cached, str):
            if (config := known_config(name)) is not None:
                family = family_of(config, Path(name))
                whole = family.read_config(config, Path(name), has_head=True)
                return ModelShape.of_backbone(family.family, whole)  # type: ignore[arg-type]
            raise UserError(
                f"{key} is {start}, which is not in the hub's cache on this machine; download its config.json "
                f"(hf download {name} config.json), or give the sizes: --set '{key}={{family: sdar, hidden_size: "
                "..., num_layers: ..., num_heads: ..., num_kv_heads: ..., intermediate_size: ...}'"
            )
        start = str(Path(cached).parent)
    directory = checkpoint_directory(start)
    config = read_json(directory / "config.json")
    if recipe.base and recipe.convert and start == recipe.base.start:
        config["model_type"] = convertible(start, recipe.convert.shift, recipe.convert.attention)
    family = family_of(config, directory)
    return ModelShape.of_backbone(family.family, family.read_config(config, directory, has_head=True))  # type: ignore[arg-type]


@cache
def _known() -> list[dict[str, Any]]:
    path = Path(__file__).parents[1] / "recipe" / "known_checkpoints.yaml"
    loaded: list[dict[str, Any]] = yaml.safe_load(path.read_text())
    return loaded


def known_config(name: str) -> dict[str, Any] | None:
    """The shipped config.json of a hub id, with the fields that a plan needs; None for an unknown one."""
    released = name.rpartition("/")[2]
    found = (one["config"] for one in _known() if any(fnmatch(released, pattern) for pattern in one["names"]))
    config = next(found, None)
    return None if config is None else dict(config)


def vocabulary_of(recipe: Recipe) -> int:
    if manifest := RunDirectory(recipe.run_directory).manifest("prepare"):
        return int(manifest["summary"]["vocab_size"])
    if recipe.tokenizer.path is not None:
        raise UserError(
            f"tokenizer.path is {recipe.tokenizer.path}, whose vocabulary is not known before the stage prepare; give "
            "--vocab_size"
        )
    return recipe.tokenizer.vocab_size


def rows_of(recipe: Recipe, flags: TrainPlanFlags | PlanFlags | SignalsPlanFlags) -> Rows:
    manifest = RunDirectory(recipe.run_directory).manifest("prepare")
    if manifest and (chunks := manifest["summary"].get("chunks")):
        rows, tokens, labelled = (sum(chunks[name]) for name in ("rows", "tokens", "labelled"))
        return Rows(rows, tokens / rows, labelled / tokens, "counted by the stage prepare")
    mean = flags.example_tokens or float(recipe.data.max_length)
    source = "given" if flags.example_tokens else "data.max_length for every example, an upper bound"
    return Rows(flags.examples or recipe.data.num_train, mean, 1.0, source)


def _show(job: Job, recipe: Recipe, rows: Rows, gpus: int, flags: TrainPlanFlags, console: Console) -> None:
    shape, settings = job.shape, job.settings
    layers = shape.all_layers
    console.print(f"{job.name}: {shape.parameters:,} parameters, {layers:,} of them in {shape.num_layers} layers")
    table = Table("strategy", title_justify="left")
    for part in (*PARTS, "peak", "fits", "host", "fewest GPUs"):
        table.add_column(part, justify="right")
    own, *others = _strategies(settings)
    most = USABLE * MEMORY[flags.device]
    recompute = _checkpointing(settings.activation_checkpointing)
    needed = memory_of(job, recipe, rows, own.apply(settings), gpus, flags.device).peak
    unit, name = (1e9, "GB") if needed > 1e9 else (1e6, "MB")
    table.title = (
        f"{name} per GPU on {gpus} x {flags.device} ({most / unit:,.0f} usable), {settings.dtype}, activation "
        f"checkpointing {recompute}"
    )
    for strategy in (own, *others):
        changed = strategy.apply(settings)
        need = memory_of(job, recipe, rows, changed, gpus, flags.device)
        numbers = [f"{value / unit:,.1f}" for value in (*(getattr(need, part) for part in PARTS), need.peak)]
        host = f"{need.host / unit:,.1f}" if need.host else ""
        fewest = fewest_gpus(job, recipe, rows, changed, flags.device)
        table.add_row(strategy.name, *numbers, "yes" if fits(need, flags.device) else "no", host, fewest)
    console.print(table)
    for mode in CHECKPOINTING:
        if mode != settings.activation_checkpointing:
            changed = replace(settings, activation_checkpointing=mode)
            need = memory_of(job, recipe, rows, changed, gpus, flags.device)
            words = f"with activation checkpointing {_checkpointing(mode)}"
            console.print(f"{words}: activations {need.activations / unit:,.1f} {name}")
    stored, scratch = (size / 1e9 for size in most_bytes(shape, settings))
    console.print(
        f"checkpoints, at most: {stored:,.1f} GB on the storage until the stage is done (keep_checkpoints "
        f"{settings.keep_checkpoints}), {scratch:,.1f} GB in TMPDIR; model: {FP32 * shape.parameters / 1e9:,.1f} GB"
    )
    for line in _cost(job, rows, gpus, flags):
        console.print(line)
    console.print()


def _checkpointing(mode: bool | str) -> str:
    return mode if isinstance(mode, str) else "on" if mode else "off"


def _strategies(settings: TrainSettings) -> Iterator[Strategy]:
    own: dict[str, Any] = {n: getattr(settings, n) for n in ("strategy", "cpu_offload", "deepspeed", "shard_size")}
    offload = ", offload" if settings.cpu_offload else ""
    yield Strategy(f"recipe: {settings.strategy}{offload}", own)
    not_by_deepspeed = settings.lora or settings.optimizer == "muon"
    yield from (s for s in STRATEGIES if not (not_by_deepspeed and s.settings["strategy"] == "deepspeed"))


def memory_of(job: Job, recipe: Recipe, rows: Rows, settings: TrainSettings, gpus: int, device: str) -> Memory:
    residual = job.residual.feeds_back if job.residual else False
    kept = recipe.signals.top_k if residual else 0
    step = step_shape(job.shape, settings, recipe.data.max_length, gpus, rows.labelled_share, kept)
    return memory(job.shape, settings, step, gpus, card=MEMORY[device])


def fewest_gpus(job: Job, recipe: Recipe, rows: Rows, settings: TrainSettings, device: str) -> str:
    """The smallest number of GPUs that divides the batch size and on which the training fits."""
    counts = (n for n in range(1, min(MAX_GPUS, settings.batch_size) + 1) if settings.batch_size % n == 0)
    return next((str(n) for n in counts if fits(memory_of(job, recipe, rows, settings, n, device), device)), "none")


def _cost(job: Job, rows: Rows, gpus: int, flags: TrainPlanFlags) -> Iterator[str]:
    settings = job.settings
    if settings.epochs is not None and rows.examples is None:
        yield (
            f"steps: {settings.epochs:g} epochs of an unknown number of examples; run the stage prepare, or give "
            "--examples"
        )
        return
    settings = settings.resolved(rows.examples or 0)
    total = cost_of(job, rows, gpus, flags.device, flags.mfu)
    yield (
        f"{settings.steps:,} steps of {settings.batch_size}: {total.tokens:,.0f} tokens ({rows.source}), "
        f"{total.flops:.3g} FLOPs, {device_time(total.hours)} on {gpus} x {flags.device} at MFU {flags.mfu:g}"
    )


def cost_of(job: Job, rows: Rows, gpus: int, device: str, mfu: float) -> TrainingCost:
    """Of a job whose number of steps is known."""
    settings = job.settings.resolved(rows.examples or 0)
    num_rows = settings.steps * settings.batch_size
    return training_cost(job.shape, num_rows, rows.mean_tokens, rows.labelled_share, gpus, device, mfu, job.forwards)


def device_time(hours: float) -> str:
    return duration(3600 * hours)
