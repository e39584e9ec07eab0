"""`rcd train plan`: what a recipe's training needs, before any GPU is asked for.

rcd train plan --recipe sdar-8b-b64 --device H100 --mfu 0.4
rcd train plan --recipe demo --gpus 4 --set target.train.strategy=fsdp2
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.recipe.load import load_recipe
from pipelines.recipe.model import Recipe
from pipelines.recipe.rules import is_hub_id
from pipelines.run.directory import RunDirectory
from pipelines.run.messages import make_console
from rcd_core.errors import UserError
from rcd_core.families.config import ModelConfig
from rcd_core.families.files import read_json
from rcd_core.families.loading import checkpoint_directory, family_of
from rcd_core.residual import ResidualSettings
from rcd_core.training.plan import MEMORY, USABLE, Memory, ModelShape, fits, memory, step_shape, training_cost
from rcd_core.training.settings import TrainSettings

MOST_GPUS = 1024
PARTS = ("weights", "gradients", "optimizer", "activations", "loss", "signals")
OWN_FORWARDS = 1.5  # the source self runs the model once or twice more on each row


@dataclass(frozen=True)
class Option:
    """A strategy to compare: the settings that choose it."""

    name: str
    settings: dict[str, Any]

    def of(self, settings: TrainSettings) -> TrainSettings:
        chosen: dict[str, Any] = {"deepspeed": {}, "cpu_offload": False} | self.settings
        return replace(settings, **chosen)


OPTIONS = (
    Option("ddp", {"strategy": "ddp"}),
    Option("fsdp2", {"strategy": "fsdp2"}),
    Option("fsdp2, offload", {"strategy": "fsdp2", "cpu_offload": True}),
    *(
        Option(f"deepspeed {stage}", {"strategy": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}})
        for stage in (1, 2, 3)
    ),
    Option(
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="train_command", required=True)
    plan = commands.add_parser("plan", help="bytes per GPU by strategy, the fewest GPUs, FLOPs and hours")
    plan.add_argument("--recipe", required=True, metavar="R", help="a shipped recipe's name or a YAML file")
    plan.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    plan.add_argument("--device", default="H100", choices=sorted(MEMORY), help="GPU (default: H100)")
    plan.add_argument("--gpus", type=int, metavar="N", help="how many; by default resources.num_workers")
    plan.add_argument("--mfu", type=float, default=0.4, metavar="F", help="share of the peak that is reached")
    plan.add_argument("--examples", type=int, metavar="N", help="training examples, where prepare has not counted them")
    plan.add_argument("--example_tokens", type=float, metavar="T", help="mean length; by default data.max_length")
    plan.add_argument("--vocab_size", type=int, metavar="V", help="of a tokenizer that is not on this machine")


def run(options: argparse.Namespace) -> int:
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu is {options.mfu}; it is a share of the peak, in (0, 1]")
    for name in ("gpus", "examples", "example_tokens", "vocab_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    recipe = load_recipe(options.recipe, options.set)
    console = make_console()
    gpus = options.gpus or recipe.resources.worker_counts[-1]
    rows = _rows(recipe, options)
    for job in _jobs(recipe, options):
        _show(job, recipe, rows, gpus, options, console)
    return 0


# -- what is trained


@dataclass(frozen=True)
class Job:
    """One training of the recipe. forwards: further passes over each row, in forwards of the trained model."""

    name: str
    shape: ModelShape
    settings: TrainSettings
    residual: ResidualSettings | None
    forwards: float


@dataclass(frozen=True)
class Rows:
    """The training examples: how many, their mean length, the share of labelled tokens."""

    examples: int | None
    mean_tokens: float
    labelled_share: float
    source: str


def _jobs(recipe: Recipe, options: argparse.Namespace) -> Iterator[Job]:
    reference = recipe.reference
    if recipe.base:
        shape = _shape("base.start", recipe.base.start, recipe, options)
        yield Job("base", shape, recipe.base.train, None, 0.0)
    smaller = None
    if reference is not None and (reference.train or recipe.target.residual.source == "online"):
        smaller = _shape("reference.start", reference.start, recipe, options)
        if reference.train:
            yield Job("reference", smaller, reference.train, None, 0.0)
    start = recipe.target.start or (recipe.base.start if recipe.base else None)
    assert start is not None  # a rule of the recipe
    shape = _shape("target.start", start, recipe, options)
    residual = recipe.target.residual
    forwards = OWN_FORWARDS if residual.runs_model else 0.0
    if residual.source == "online" and smaller is not None:
        forwards = smaller.parameters / shape.parameters
    yield Job("target", shape, recipe.training("target").train, residual, forwards)


def _shape(key: str, start: str | ModelConfig, recipe: Recipe, options: argparse.Namespace) -> ModelShape:
    """Sizes from the recipe, or from a checkpoint's config.json; nothing is downloaded."""
    if isinstance(start, ModelConfig):
        return ModelShape.of(start, _vocab_size(recipe, options))
    if "://" not in start and not Path(start).is_dir() and is_hub_id(start):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(start, "config.json")
        if not isinstance(cached, str):
            raise UserError(
                f"{key} is {start}, which is not in the hub's cache on this machine; fetch its config.json "
                f"(hf download {start} config.json), or give the sizes: --set '{key}={{family: sdar, hidden_size: "
                "..., num_layers: ..., num_heads: ..., num_kv_heads: ..., intermediate_size: ...}'"
            )
        start = str(Path(cached).parent)
    return _checkpoint_shape(checkpoint_directory(start))


def _checkpoint_shape(directory: Path) -> ModelShape:
    config = read_json(directory / "config.json")
    family = family_of(config, directory)
    return ModelShape.of_backbone(family.family, family.read_config(config, directory, has_head=True))  # type: ignore[arg-type]


def _vocab_size(recipe: Recipe, options: argparse.Namespace) -> int:
    if options.vocab_size:
        return int(options.vocab_size)
    if manifest := RunDirectory(recipe.run_directory).manifest("prepare"):
        return int(manifest["summary"]["vocab_size"])
    if recipe.tokenizer.path is not None:
        raise UserError(
            f"the vocabulary of tokenizer.path {recipe.tokenizer.path} is not known before the stage prepare; give "
            "--vocab_size"
        )
    return recipe.tokenizer.vocab_size


def _rows(recipe: Recipe, options: argparse.Namespace) -> Rows:
    manifest = RunDirectory(recipe.run_directory).manifest("prepare")
    if manifest and (chunks := manifest["summary"].get("chunks")):
        rows, tokens, labelled = (sum(chunks[name]) for name in ("rows", "tokens", "labelled"))
        return Rows(rows, tokens / rows, labelled / tokens, "counted by the stage prepare")
    mean = options.example_tokens or float(recipe.data.max_length)
    source = "given" if options.example_tokens else "data.max_length for every example, an upper bound"
    return Rows(options.examples or recipe.data.num_train, mean, 1.0, source)


# -- what it says


def _show(job: Job, recipe: Recipe, rows: Rows, gpus: int, options: argparse.Namespace, console: Console) -> None:
    shape, settings = job.shape, job.settings
    layers = shape.num_layers * shape.layer_parameters
    console.print(f"{job.name}: {shape.parameters:,} parameters, {layers:,} of them in {shape.num_layers} layers")
    table = Table("strategy", title_justify="left")
    for part in (*PARTS, "peak", "fits", "host", "fewest GPUs"):
        table.add_column(part, justify="right")
    own, *others = _options(settings)
    most = USABLE * MEMORY[options.device]
    recompute = "on" if settings.activation_checkpointing else "off"
    unit, name = (1e9, "GB") if _memory(job, recipe, rows, own.of(settings), gpus).peak > 1e9 else (1e6, "MB")
    table.title = (
        f"{name} per GPU on {gpus} x {options.device} ({most / unit:,.0f} usable), {settings.dtype}, activation "
        f"checkpointing {recompute}"
    )
    for option in (own, *others):
        chosen = option.of(settings)
        found = _memory(job, recipe, rows, chosen, gpus)
        numbers = [f"{value / unit:,.1f}" for value in (*(getattr(found, part) for part in PARTS), found.peak)]
        yes = "yes" if fits(found, options.device) else "no"
        fewest = _fewest(job, recipe, rows, chosen, options.device)
        table.add_row(option.name, *numbers, yes, f"{found.host / unit:,.1f}" if found.host else "", fewest)
    console.print(table)
    other = replace(settings, activation_checkpointing=not settings.activation_checkpointing)
    found = _memory(job, recipe, rows, other, gpus)
    state = "on" if other.activation_checkpointing else "off"
    console.print(f"with activation checkpointing {state}: activations {found.activations / unit:,.1f} {name}")
    for line in _cost(job, rows, gpus, options):
        console.print(line)
    console.print()


def _options(settings: TrainSettings) -> Iterator[Option]:
    own: dict[str, Any] = {n: getattr(settings, n) for n in ("strategy", "cpu_offload", "deepspeed")}
    offload = ", offload" if settings.cpu_offload else ""
    yield Option(f"recipe: {settings.strategy}{offload}", own)
    yield from OPTIONS


def _memory(job: Job, recipe: Recipe, rows: Rows, settings: TrainSettings, gpus: int) -> Memory:
    residual = job.residual.feeds_back if job.residual else False
    kept = recipe.signals.top_k if residual else 0
    step = step_shape(job.shape, settings, recipe.data.max_length, gpus, rows.labelled_share, kept)
    return memory(job.shape, settings, step, gpus)


def _fewest(job: Job, recipe: Recipe, rows: Rows, settings: TrainSettings, device: str) -> str:
    """The smallest number of GPUs that divides the batch and on which it fits."""
    counts = (n for n in range(1, min(MOST_GPUS, settings.batch_size) + 1) if settings.batch_size % n == 0)
    found = next((n for n in counts if fits(_memory(job, recipe, rows, settings, n), device)), None)
    return "none" if found is None else str(found)


def _cost(job: Job, rows: Rows, gpus: int, options: argparse.Namespace) -> Iterator[str]:
    settings = job.settings
    if settings.epochs is not None and rows.examples is None:
        yield (
            f"steps: {settings.epochs:g} epochs of a number of examples that is not known; run the stage prepare, or "
            "give --examples"
        )
        return
    settings = settings.resolved(rows.examples or 0)
    total = training_cost(
        job.shape,
        settings.steps * settings.batch_size,
        rows.mean_tokens,
        rows.labelled_share,
        gpus,
        options.device,
        options.mfu,
        job.forwards,
    )
    yield (
        f"{settings.steps:,} steps of {settings.batch_size}: {total.tokens:,.0f} tokens ({rows.source}), "
        f"{total.flops:.3g} FLOPs, {total.hours:,.1f} hours on {gpus} x {options.device} at MFU {options.mfu:g}"
    )


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"
