"""base, reference, target, target-<variant>, baseline, baseline-<name>: one training job each, on Ray Train.

    python pipelines/train.py --recipe demo --stages base

The loop is rcd_core.training.loop and knows no Ray. Around it: this file turns the recipe into a job and runs it,
train_worker.py is what runs on every rank, train_checkpoints.py and train_faults.py are what a killed worker or driver
is survived with. Ray Train finds a run's checkpoints under the same storage path and name; the name holds the stage's
key, so that another recipe never goes on from them.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipelines.ray_cluster.resources import describe_bundles
from pipelines.run.directory import StageContext
from pipelines.training.metrics import Progress, read_metrics, write_events
from pipelines.training.worker import SEED_BITS, TrainJob, train_worker
from rcd_core.decode_settings import SCALED_RULES
from rcd_core.io import storage
from rcd_core.noise import hash_key
from rcd_core.residual import ResidualSettings
from rcd_core.training.data.examples import Chunks
from rcd_core.training.data.signal_cache import noise_record, require_match
from rcd_core.training.data.signal_format import SCHEMA_VERSION

RESIZE_EVERY_S = 60.0  # an elastic run looks so often whether there is room for more workers


def run(ctx: StageContext) -> dict[str, Any]:
    """Train the stage's model and leave it in <stage>/model. Summary: digest of the weights, steps, last metrics."""
    job = make_job(ctx)
    with Progress(ctx, job.settings.steps):
        _fit(ctx, job)
    model = storage.join(ctx.directory, "model")
    lines = read_metrics(ctx.directory)
    write_events(storage.join(ctx.directory, "tensorboard"), lines)
    storage.remove(storage.join(ctx.directory, "ray"))  # checkpoints, and what crashed uploads left
    digests = [storage.sha256(file) for file in storage.list_files(model, ".safetensors")]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    config = storage.read_json(storage.join(model, "config.json"))
    return {
        "steps": job.settings.steps,
        "loss": round(lines[-1]["loss"], 6),
        "rcd": config.get("rcd"),
        "weights_sha256": digest,
        "fingerprint": [digest, config.get("rcd")],
    }


def make_job(ctx: StageContext) -> TrainJob:
    """Everything the recipe and the stages before say about this training."""
    recipe, training = ctx.recipe, ctx.recipe.training(ctx.stage)
    prepare, prepared = ctx.input("prepare")["summary"], ctx.input_dir("prepare")
    chunks = Chunks.from_manifest(prepare["chunks"])
    residual = training.residual or ResidualSettings(source="none", dropout=0.0)
    noise, signals, reference = recipe.noise, None, None
    if ctx.stage in ("base", "reference"):
        # Masks of their own, so that the second stage does not meet the very masks its start was trained on.
        noise = replace(noise, seed=hash_key(noise.seed, ctx.stage) & SEED_BITS)
    if residual.source == "signals":
        signals = {**ctx.input("signals")["summary"], "directory": ctx.input_dir("signals")}
        residual = _with_alpha_scale(signals, residual)
        _check_signals(ctx, signals)
    elif residual.source == "online":
        reference = ctx.checkpoint("reference")
    settings = training.train.resolved(sum(chunks.rows))
    validation = prepare["validation"] if settings.validate_every else ()
    return TrainJob(
        run=recipe.name,
        stage=ctx.stage,
        directory=ctx.directory,
        start=training.start if training.start is not None else ctx.checkpoint("base"),
        tokenizer=storage.join(prepared, "tokenizer"),
        examples=tuple(storage.join(prepared, "train", name) for name in prepare["train"]),
        chunks=chunks,
        validation=tuple(storage.join(prepared, "validation", name) for name in validation),
        signals=signals,
        reference=reference,
        signal_rule=recipe.signals.rule,
        noise=noise,
        block_length=recipe.block_length,
        settings=replace(settings, seed=hash_key(recipe.seed, settings.seed, "train") & SEED_BITS),
        residual=residual,
        threads=max(1, int(recipe.resources.cpus_per_worker)),
    )


def _with_alpha_scale(signals: dict[str, Any], residual: ResidualSettings) -> ResidualSettings:
    """h of the calibrated rules from the reference signals of the training rows, unless the recipe gives it."""
    if residual.alpha not in SCALED_RULES or residual.alpha_scale is not None:
        return residual
    from rcd_core.calibration.distance import entropy_quantile

    quantile = entropy_quantile(signals["entropy_histogram"], residual.alpha_quantile)
    return replace(residual, alpha_scale=round(quantile, 6))


def _check_signals(ctx: StageContext, signals: dict[str, Any]) -> None:
    """Signals of other tokens, blocks or noise would train something else without a word."""
    recipe, prepare = ctx.recipe, ctx.input("prepare")["summary"]
    wanted = {
        "schema_version": SCHEMA_VERSION,
        "block_length": recipe.block_length,
        "pad_multiple": recipe.data.pad_multiple or recipe.block_length,
        "mask_token_id": prepare["mask_token_id"],
        "tokenizer_sha256": prepare["tokenizer_sha256"],
        "noise": noise_record(recipe.noise),
    }
    require_match(signals, wanted, "the recipe's")


def _fit(ctx: StageContext, job: TrainJob) -> None:
    """Run the workers to the end. Lost ones are replaced, up to resources.max_failures times; a UserError of a worker
    arrives here as it was raised, and nothing is tried again for it."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.training.checkpoints import NUM_TO_KEEP
    from pipelines.training.faults import Deadline, RetryLostWorkersOnly, attempt_s, explained

    resources = ctx.recipe.resources
    wanted = describe_bundles([resources.worker_bundle(ctx.stage)] * resources.worker_counts[0])
    # Read by Ray Train's controller, which gets the driver's values.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(attempt_s(resources.timeout_s))
    scaling: dict[str, Any] = {
        "num_workers": resources.num_workers,  # a pair makes it elastic
        "use_gpu": resources.gpus_per_worker > 0,
        "resources_per_worker": resources.worker_bundle(ctx.stage),
        "elastic_resize_monitor_interval_s": RESIZE_EVERY_S,
    }
    callbacks: list[Any] = [
        RetryLostWorkersOnly(ctx.stage, ctx.directory),
        Deadline(ctx.stage, wanted, resources.timeout_s),
    ]
    # Offloaded shards and their gradient norm are summed on the CPU, which NCCL cannot.
    offloads = job.settings.cpu_offload and resources.gpus_per_worker > 0
    trainer = TorchTrainer(
        train_worker,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if offloads else None),
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(
            name=ctx.key[:16],
            storage_path=storage.join(ctx.directory, "ray"),
            failure_config=FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=NUM_TO_KEEP),
            callbacks=callbacks,
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise explained(error, ctx.stage, resources.max_failures) from None


if __name__ == "__main__":
    from pipelines.run.driver import stage_main

    stage_main("base", "reference", "target", "target-*", "baseline", "baseline-*")
