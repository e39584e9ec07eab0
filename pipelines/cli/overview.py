"""`rcd plan`: time, memory and disk of every stage of a recipe that needs GPUs, in one table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from pipelines.cli.plan import (
    Job,
    Rows,
    check_flags,
    cost_of,
    device_time,
    fewest_gpus,
    jobs_of,
    memory_of,
    rows_of,
    shape_of,
)
from pipelines.cli.plan_flags import PlanFlags
from pipelines.cli.plan_signals import amounts
from pipelines.recipe.load import load_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.messages import make_console
from pipelines.signals.costs import PASSES, column_bytes, costs
from rcd_core.errors import UserError
from rcd_core.training.plan import ADAM, FP32, MEMORY, USABLE, fits, peak

CHECKPOINTS = 3  # that a training keeps at most: two, and the one that it writes


@dataclass(frozen=True)
class Line:
    """One stage. hours: of one GPU. peak: bytes on each GPU, None where they are not planned. disk: bytes."""

    stage: str
    work: str
    hours: float
    peak: float | None
    fits: str
    fewest: str
    disk: float
    kept: str  # what the disk holds


def plan(flags: PlanFlags) -> int:
    check_flags(flags)
    recipe = load_recipe(flags.recipe, flags.set)
    rows = rows_of(recipe, flags)
    if rows.examples is None:
        raise UserError(
            "the number of training examples is not known before the stage prepare; give --examples, and "
            "--example_tokens with their mean length"
        )
    gpus = flags.gpus or recipe.resources.worker_counts[-1]
    lines = sorted(_lines(recipe, rows, gpus, flags), key=lambda line: _ORDER.index(line.stage.partition("-")[0]))
    if not lines:
        raise UserError(f"recipe {recipe.name} trains nothing, so there is nothing to plan")
    console = make_console()
    title = f"recipe {recipe.name} on {gpus} x {flags.device}, MFU {flags.mfu:g}"
    table = Table("stage", "work", title=title, title_justify="left")
    for name in ("time", "GPU hours", "memory of a GPU", "fits", "fewest GPUs", "disk, at most"):
        table.add_column(name, justify="right")
    for line in lines:
        memory = "" if line.peak is None else size(line.peak)
        times = elapsed(line.hours / gpus), gpu_hours(line.hours)
        table.add_row(line.stage, line.work, *times, memory, line.fits, line.fewest, f"{size(line.disk)} {line.kept}")
    total = sum(line.hours for line in lines)
    table.add_section()
    table.add_row("all", "", elapsed(total / gpus), gpu_hours(total))
    console.print(table)
    console.print(
        f"Planned from sizes, not measured. Lengths: {rows.source}. Checkpoints are removed when their stage is done.\n"
        "Not planned: prepare, calibrate, evaluate and deploy; `rcd fit` says how many requests decode at once.\n"
        "Every strategy: rcd train plan. When cached signals pay: rcd signals plan.",
        markup=False,
        soft_wrap=True,
    )
    return 0


_ORDER = ("base", "reference", "signals", "target", "baseline")


def _lines(recipe: Recipe, rows: Rows, gpus: int, flags: PlanFlags) -> Iterator[Line]:
    jobs = list(jobs_of(recipe, flags.vocab_size))
    yield from (_training(job, recipe, rows, gpus, flags) for job in jobs)
    if any(residual.source == "signals" for residual in recipe.residuals().values()):
        yield _signals(jobs, recipe, rows, flags)


def _training(job: Job, recipe: Recipe, rows: Rows, gpus: int, flags: PlanFlags) -> Line:
    settings = job.settings.resolved(rows.examples or 0)
    total = cost_of(job, rows, gpus, flags.device, flags.mfu)
    need = memory_of(job, recipe, rows, job.settings, gpus, flags.device)
    return Line(
        stage=job.name,
        work=f"{settings.steps:,} steps of {settings.batch_size}, {tokens(total.tokens)} tokens",
        hours=total.hours * gpus,
        peak=need.peak,
        fits="yes" if fits(need, flags.device) else "no",
        fewest=fewest_gpus(job, recipe, rows, job.settings, flags.device),
        disk=0.0 if settings.lora else CHECKPOINTS * job.shape.parameters * (FP32 + ADAM),
        kept="of adapters" if settings.lora else "checkpoints",
    )


def _signals(jobs: list[Job], recipe: Recipe, rows: Rows, flags: PlanFlags) -> Line:
    target = next(job.shape for job in jobs if job.name == "target")
    assert recipe.reference is not None  # a rule of the recipe
    first = recipe.reference.start or (recipe.base.start if recipe.base else None)
    assert first is not None  # a rule of the recipe
    reference = shape_of("reference.start", first, recipe, flags.vocab_size)
    cached = amounts(recipe, rows, reference.vocab_size)
    speed = peak(flags.device) * flags.mfu
    parameters = reference.parameters, target.parameters
    cost = costs(cached, PASSES[reference.family], *parameters, speed, 0.0)
    weights = 2.0 * reference.parameters  # in bf16; passes adapt to what is left
    usable = weights <= USABLE * MEMORY[flags.device]
    return Line(
        stage="signals",
        work=f"{cached.rows:,} rows, {tokens(cached.tokens)} tokens",
        hours=cost.reference_hours,
        peak=None,
        fits="yes" if usable else "no",
        fewest="1" if usable else "none",
        disk=sum(column_bytes(cached, recipe.signals.top_k).values()),
        kept="of files",
    )


def size(num_bytes: float) -> str:
    """In the largest unit of which there is one or more."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.3g} {unit}"
    return f"{num_bytes / 1e3:,.0f} kB"


def tokens(count: float) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6)):
        if count >= scale:
            return f"{count / scale:,.3g}{unit}"
    return f"{count:,.0f}"


def elapsed(hours: float) -> str:
    return device_time(hours) if hours * 3600 >= 1 else "under 1 s"


def gpu_hours(hours: float) -> str:
    if hours >= 10:
        return f"{hours:,.0f}"
    return f"{hours:.1f}" if hours >= 0.1 else "under 0.1"
