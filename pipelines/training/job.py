"""One training as its workers get it, made from the recipe and the manifests of the stages before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pipelines.recipe.model import ConvertSettings
from pipelines.run.directory import StageContext
from rcd_core.calibration.entropy_histogram import entropy_quantile
from rcd_core.decode_settings import SCALED_RULES
from rcd_core.families.config import ModelConfig
from rcd_core.io import storage
from rcd_core.noise import NoiseSettings, seed_of
from rcd_core.process import ProcessSettings
from rcd_core.training.data.examples import Chunks
from rcd_core.training.data.signal_cache import noise_record, require_match
from rcd_core.training.data.signal_format import SCHEMA_VERSION
from rcd_core.training.settings import ResidualSettings, SignalRule, TrainSettings


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """All that a worker needs. Serializable, without references to the driver."""

    run: str
    stage: str
    directory: str
    start: str | ModelConfig  # a checkpoint, or the sizes of a new model
    convert: ConvertSettings | None  # if the checkpoint is an autoregressive model
    tokenizer: str
    examples: tuple[str, ...]
    chunks: Chunks
    validation: tuple[str, ...]  # files of the held-out examples; empty without validation
    signals: dict[str, Any] | None  # summary of the stage `signals`, with its directory
    reference: str | None  # only if the reference runs online, or as the teacher
    signal_rule: SignalRule
    noise: NoiseSettings
    block_length: int
    settings: TrainSettings
    residual: ResidualSettings
    threads: int
    gpus: float
    last_step: int  # of this stage; settings.steps but for the rounds before the last
    resume_from: str | None = None  # the state that the round before left
    process: ProcessSettings = ProcessSettings()


def make_job(ctx: StageContext) -> TrainJob:
    """Raises UserError if the signals were computed for other tokens, blocks or noise."""
    recipe, training = ctx.recipe, ctx.recipe.training(ctx.stage)
    prepare, prepared = ctx.input("prepare")["summary"], ctx.input_dir("prepare")
    chunks = Chunks.from_manifest(prepare["chunks"])
    residual = training.residual or ResidualSettings(source="none", dropout=0.0)
    noise, signals, reference = recipe.noise, None, None
    number = recipe.round_of(ctx.stage) or 1
    if ctx.stage in ("base", "reference"):
        # Masks of its own, so that the next stage does not see the masks that its start was trained on.
        noise = replace(noise, seed=seed_of(noise.seed, ctx.stage))
    settings = training.train.resolved(sum(chunks.rows))
    ends, resume_from = recipe.target.round_ends(settings.steps), None
    if number > 1:
        before = ctx.input(f"round-{number - 1}")["summary"]
        resume_from = before["state"]
        residual = replace(residual, alpha_scale=before["rcd"]["alpha_scale"])
    if residual.source == "signals":
        source = "signals" if number == 1 else f"signals-{number}"
        signals = {**ctx.input(source)["summary"], "directory": ctx.input_dir(source)}
        if residual.alpha in SCALED_RULES and residual.alpha_scale is None:
            # h of the calibrated rules, from the reference signals of the training rows.
            quantile = entropy_quantile(signals["entropy_histogram"], residual.alpha_quantile)
            residual = replace(residual, alpha_scale=round(quantile, 6))
        check_signals(ctx, signals)
    if residual.source == "online" or training.train.distill:
        reference = ctx.checkpoint("reference")
    validation = prepare["validation"] if settings.validate_every else ()
    return TrainJob(
        run=recipe.name,
        stage=ctx.stage,
        directory=ctx.directory,
        start=training.start if training.start is not None else ctx.checkpoint("base"),
        convert=recipe.convert if ctx.stage == "base" else None,
        tokenizer=storage.join(prepared, "tokenizer"),
        examples=tuple(storage.join(prepared, "train", name) for name in prepare["train"]),
        chunks=chunks,
        validation=tuple(storage.join(prepared, "validation", name) for name in validation),
        signals=signals,
        reference=reference,
        signal_rule=recipe.signals.rule,
        noise=noise,
        block_length=recipe.block_length,
        settings=replace(settings, seed=seed_of(recipe.seed, settings.seed, "train")),
        residual=residual,
        threads=max(1, int(recipe.resources.cpus_per_worker)),
        gpus=recipe.resources.gpus_per_worker,
        last_step=ends[number - 1] if recipe.round_of(ctx.stage) else settings.steps,
        resume_from=resume_from,
        process=recipe.process,
    )


def check_signals(ctx: StageContext, signals: dict[str, Any]) -> None:
    """Raises UserError if the signals were computed for something else, which would train wrongly without an error."""
    recipe, prepare = ctx.recipe, ctx.input("prepare")["summary"]
    expected = {
        "schema_version": SCHEMA_VERSION,
        "block_length": recipe.block_length,
        "pad_multiple": recipe.data.pad_multiple or recipe.block_length,
        "mask_token_id": prepare["mask_token_id"],
        "tokenizer_sha256": prepare["tokenizer_sha256"],
        "noise": noise_record(recipe.noise),
    }
    require_match(signals, expected, "the recipe's")
