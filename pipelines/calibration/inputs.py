"""What the stage `calibrate` works on: one job per model, and held-out problems of the training split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from pipelines.calibration.job import CalibrationJob, synthetic_problems
from pipelines.data.sources import rows_of, source_files
from pipelines.run.directory import StageContext
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.tasks import Problem, get_task
from rcd_core.tasks.files import BadRow
from rcd_core.text.encoding import content_id, example_of
from rcd_core.training.data.examples import open_parquet


def make_jobs(ctx: StageContext) -> list[CalibrationJob]:
    """One job per target and baseline among the inputs: a pure function of the recipe and the manifests."""
    recipe, settings = ctx.recipe, ctx.recipe.calibrate
    assert settings is not None  # otherwise the recipe has no such stage
    decode = replace(
        settings.decode,
        block_length=settings.decode.block_length or recipe.block_length,
        seed=recipe.seed if settings.decode.seed is None else settings.decode.seed,
    )
    jobs = []
    for stage in ctx.inputs:
        if not stage.startswith(("target", "baseline")):
            continue
        residual = recipe.residual(stage)
        feeds_back = residual is not None and residual.has_alpha
        uses_reference = residual is not None and residual.source in ("signals", "online")
        uses_reference = uses_reference and recipe.round_of(stage) is None  # the last signals were its own
        jobs.append(
            CalibrationJob(
                stage=stage,
                checkpoint=ctx.checkpoint(stage),
                reference=ctx.checkpoint("reference") if uses_reference else None,
                calibrated=feeds_back,
                tokenizer=storage.join(ctx.input_dir("prepare"), "tokenizer"),
                task=recipe.data.task,
                num_examples=settings.num_examples,
                decode=decode if feeds_back else replace(decode, residual=False, start=None),
                noise=recipe.noise,
                signal_rule=recipe.signals.rule,
                match=settings.match,
                pad_multiple=recipe.data.pad_multiple or recipe.block_length,
                max_length=recipe.data.max_length,
                run_code=recipe.evaluate.run_code,
                threads=max(1, int(recipe.resources.cpus_per_worker)),
                gpus=recipe.resources.gpus_per_worker,
                process=recipe.process,
            )
        )
    return jobs


def held_out_problems(ctx: StageContext, limit: int) -> list[Problem]:
    """Up to `limit` problems of the training split that no model was trained on.

    Synthetic data: problems beyond those of the training. Files: the examples that `prepare` held out
    (data.num_validation), found by their content. Raises UserError if the files no longer contain them.
    """
    recipe = ctx.recipe
    sources = source_files(recipe, "train")
    if not sources:
        return list(islice(synthetic_problems(recipe.data.task, recipe.seed), limit))
    task = get_task(recipe.data.task)
    ids = set(islice(_validation_ids(ctx), limit))
    problems: dict[str, Problem] = {}
    for row in (row for source in sources for row in rows_of(recipe, "train", source.path)):
        if len(problems) == len(ids):
            break
        try:
            problem = example_of(row, task)
        except BadRow:
            continue
        if isinstance(problem, Problem) and (name := content_id(problem)) in ids:
            problems.setdefault(name, problem)
    if not problems:
        raise UserError(
            "calibrate: data.train has none of the examples that prepare held out, or they have several turns, which "
            "calibrate does not decode; restore the files, or set calibrate to null"
        )
    return [problems[name] for name in sorted(problems)]


def _validation_ids(ctx: StageContext) -> Iterator[str]:
    for name in ctx.input("prepare")["summary"]["validation"]:
        with open_parquet(storage.join(ctx.input_dir("prepare"), "validation", name)) as file:
            yield from file.read(columns=["example_id"])["example_id"].to_pylist()
