"""base, reference, target, target-<variant>, baseline: one training job each, on Ray Train.

    python pipelines/train.py --recipe demo --stages base

The loop is rcd_core.training.loop and knows no Ray; here are the workers around it: where the model starts, which rows
it sees, where checkpoints and metrics go. A run that is killed goes on from its last checkpoint when it is started
again: Ray Train finds it under the same storage path and name, and the name holds the stage's key.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipelines.run import StageContext
from rcd_core import storage
from rcd_core.families.config import ModelConfig
from rcd_core.noise import NoiseSettings, hash_key
from rcd_core.residual import ResidualSettings
from rcd_core.training.examples import Chunks
from rcd_core.training.settings import TrainSettings
from rcd_core.training.signal_format import SCHEMA_VERSION
from rcd_core.training.signal_rows import noise_record, require_match
from rcd_core.training.signal_rule import SignalRule

PROGRESS_EVERY_S = 15.0
SEED_BITS = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """All that a worker needs, and nothing that lives in the driver."""

    stage: str
    directory: str
    start: str | ModelConfig  # a checkpoint, or the sizes of a fresh model
    tokenizer: str
    examples: tuple[str, ...]
    chunks: Chunks
    signals: dict[str, Any] | None  # summary of the signals stage, with its directory
    reference: str | None  # only where the reference runs online
    signal_rule: SignalRule
    noise: NoiseSettings
    block_length: int
    settings: TrainSettings
    residual: ResidualSettings
    threads: int


def run(ctx: StageContext) -> dict[str, Any]:
    """Train the stage's model and leave it in <stage>/model. Summary: digest of the weights, steps, last metrics."""
    job = make_job(ctx)
    with _Progress(ctx, job.settings.steps):
        _fit(ctx, job)
    model = storage.join(ctx.directory, "model")
    lines = [json.loads(line) for line in storage.read_bytes(storage.join(ctx.directory, "metrics.jsonl")).splitlines()]
    _write_events(storage.join(ctx.directory, "tensorboard"), lines)
    storage.remove(storage.join(ctx.directory, "ray"))
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
    prepare = storage.join(ctx.input_dir("prepare"), "train")
    residual = training.residual or ResidualSettings(source="none", dropout=0.0)
    noise, signals, reference = recipe.noise, None, None
    if ctx.stage in ("base", "reference"):
        # Masks of their own, so that the second stage does not meet the very masks its start was trained on.
        noise = replace(noise, seed=hash_key(noise.seed, ctx.stage) & SEED_BITS)
    if residual.source != "none":
        residual = _with_alpha_scale(ctx, residual)
    if residual.source == "signals":
        signals = {**ctx.input("signals")["summary"], "directory": ctx.input_dir("signals")}
        _check_signals(ctx, signals)
    elif residual.source == "online":
        reference = ctx.checkpoint("reference")
    return TrainJob(
        stage=ctx.stage,
        directory=ctx.directory,
        start=training.start if training.start is not None else ctx.checkpoint("base"),
        tokenizer=storage.join(ctx.input_dir("prepare"), "tokenizer"),
        examples=tuple(storage.join(prepare, name) for name in ctx.input("prepare")["summary"]["train"]),
        chunks=Chunks.from_manifest(ctx.input("prepare")["summary"]["chunks"]),
        signals=signals,
        reference=reference,
        signal_rule=recipe.signals.rule,
        noise=noise,
        block_length=recipe.block_length,
        settings=replace(training.train, seed=hash_key(recipe.seed, training.train.seed, "train") & SEED_BITS),
        residual=residual,
        threads=max(1, int(recipe.resources.cpus_per_worker)),
    )


def _with_alpha_scale(ctx: StageContext, residual: ResidualSettings) -> ResidualSettings:
    """h of the calibrated rule from the reference signals of the training rows, unless the recipe gives it."""
    if residual.alpha != "calibrated_entropy" or residual.alpha_scale is not None:
        return residual
    from rcd_core.calibrate import entropy_quantile

    histogram = ctx.input("signals")["summary"]["entropy_histogram"]
    return replace(residual, alpha_scale=round(entropy_quantile(histogram, residual.alpha_quantile), 6))


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


# -- Ray Train


def _fit(ctx: StageContext, job: TrainJob) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = ctx.recipe.resources
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker={"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker},
        ),
        run_config=RunConfig(
            name=ctx.key[:16],
            storage_path=storage.join(ctx.directory, "ray"),
            failure_config=FailureConfig(max_failures=0),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()


def train_worker(config: dict[str, Any]) -> None:
    """One Ray Train worker: build or load the model, run the loop, let rank 0 write the result."""
    import torch
    from ray import train as ray_train
    from ray.train.torch import get_device

    from rcd_core.families.loading import load_model
    from rcd_core.training.examples import Limits
    from rcd_core.training.loop import Callbacks, train
    from rcd_core.training.rows import ExampleSource, RowSource
    from rcd_core.training.signal_rows import SignalSource

    job: TrainJob = config["job"]
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(job.threads)
    model = _start_model(job).to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    # In the dtype in which the stage `signals` would have run it.
    dtype = torch.bfloat16 if device.type == "cuda" else None
    reference = load_model(job.reference, device=device, dtype=dtype) if job.reference else None
    source: RowSource
    if job.signals is not None:
        facts = {name: getattr(model, name) for name in ("family", "vocab_size", "mask_token_id")}
        require_match(job.signals, facts, "the target's")
        source = SignalSource(job.signals["directory"], job.signals)
    else:
        limits = Limits(model.vocab_size, model.max_positions)
        source = ExampleSource(job.examples, job.noise, job.chunks, limits)
    rank = ray_train.get_context().get_world_rank()
    resumed = ray_train.get_checkpoint()
    with tempfile.TemporaryDirectory() as scratch:
        resume = Path(resumed.to_directory(str(Path(scratch) / "resume"))) if resumed else None
        metrics = _Metrics(job, rank, resume)

        def checkpoint(step: int, save: Any) -> None:
            """report() is a barrier: every rank calls it and brings its part of the files."""
            with tempfile.TemporaryDirectory() as directory:
                save(Path(directory))
                ray_train.report({"step": step}, checkpoint=ray_train.Checkpoint.from_directory(directory))

        weights = train(
            model,
            source,
            job.settings,
            job.residual,
            job.block_length,
            Callbacks(log=metrics.log, checkpoint=checkpoint),
            reference=reference,
            signal_rule=job.signal_rule,
            noise=job.noise,
            resume=resume,
        )
    if rank == 0:
        _export(job, model.with_weights(weights))


def _start_model(job: TrainJob) -> Any:
    import torch

    from rcd_core.families.base import CheckpointInfo
    from rcd_core.families.loading import load_model, new_model
    from rcd_core.tokenizer import load_tokenizer, mask_token_id, stop_token_ids

    if isinstance(job.start, str):
        model = load_model(job.start, dtype=torch.float32)
    else:
        tokenizer = load_tokenizer(job.tokenizer)
        info = CheckpointInfo(
            mask_token_id=mask_token_id(tokenizer),
            eos_token_ids=stop_token_ids(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            block_length=job.block_length,
        )
        seed = hash_key(job.settings.seed, job.stage, "weights") & SEED_BITS
        model = new_model(job.start, vocab_size=len(tokenizer), info=info, seed=seed)
    model.info.block_length = job.block_length
    if job.residual.source != "none":
        model.info.rcd = {
            "start": model.default_start,
            "residual_temperature": 1.0,
            "block_length": job.block_length,
            "alpha": job.residual.alpha,
            "alpha_scale": job.residual.alpha_scale,
            "residual_dropout": job.residual.dropout,
        }
    return model


def _export(job: TrainJob, model: Any) -> None:
    """Written whole under a scratch name, then renamed: a half-written model is never found."""
    from rcd_core.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, tokenizer=load_tokenizer(job.tokenizer))
        storage.remove(storage.join(job.directory, "model"))
        if storage.is_uri(job.directory):
            storage.upload_dir(directory, storage.join(job.directory, "model"))
        else:
            storage.upload_dir(directory, storage.join(job.directory, "model.partial"))
            storage.rename(storage.join(job.directory, "model.partial"), storage.join(job.directory, "model"))


class _Metrics:
    """Rank 0's metrics.jsonl; what lies after the resumed step is dropped and made again."""

    def __init__(self, job: TrainJob, rank: int, resume: Path | None) -> None:
        self.path = storage.join(job.directory, "metrics.jsonl") if rank == 0 else None
        self.lines: list[dict[str, float]] = []
        if resume and self.path and storage.exists(self.path):
            done = json.loads((resume / "progress.json").read_text())["step"]
            found = [json.loads(line) for line in storage.read_bytes(self.path).splitlines()]
            self.lines = [line for line in found if line["step"] <= done]

    def log(self, metrics: dict[str, float]) -> None:
        if self.path is None:
            return
        self.lines.append(metrics)
        storage.write_bytes(self.path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())


def _write_events(board: str, lines: list[dict[str, float]]) -> None:
    """TensorBoard events, written once, whole, from the metrics: they cannot disagree with them."""
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as directory:
        with SummaryWriter(directory) as writer:
            for line in lines:
                for name, value in line.items():
                    if name != "step":
                        writer.add_scalar(f"train/{name}", value, int(line["step"]))
        storage.remove(board)
        storage.upload_dir(directory, board)


class _Progress:
    """Prints a line now and then from what rank 0 has logged, while fit() blocks the driver."""

    def __init__(self, ctx: StageContext, steps: int) -> None:
        self.ctx, self.steps = ctx, steps
        self.path = storage.join(ctx.directory, "metrics.jsonl")
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        self.thread.join(timeout=5)

    def _watch(self) -> None:
        seen: list[tuple[float, int]] = []
        while not self.stop.wait(PROGRESS_EVERY_S):
            try:
                line = json.loads(storage.read_bytes(self.path).splitlines()[-1])
            except (OSError, ValueError, IndexError):
                continue
            if seen and seen[-1][1] == line["step"]:
                continue
            seen.append((time.monotonic(), int(line["step"])))
            (t0, s0), (t1, s1) = seen[0], seen[-1]
            rate = (s1 - s0) / (t1 - t0) if len(seen) > 1 else 0.0
            left = f", {rate:.1f} steps/s, {(self.steps - s1) / rate:.0f} s left" if rate > 0 else ""
            self.ctx.console.print(f"  {self.ctx.stage}: step {s1} of {self.steps}, loss {line['loss']:.4f}{left}")


if __name__ == "__main__":
    from pipelines.driver import stage_main

    stage_main("base", "reference", "target", "target-*", "baseline")
