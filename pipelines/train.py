"""Stages `base`, `reference`, `round-<number>`, `target[-<variant>]` and `baseline[-<name>]`: one training each, on Ray
Train. With target.rounds the target is trained in parts, whose optimiser and schedule go on.

    python pipelines/train.py --recipe demo --stages base

Reads the examples of the stage `prepare`, for a target also the shards of `signals` or the checkpoint of `reference`.
Writes <run>/<stage>/model, metrics.jsonl, restarts.jsonl and tensorboard/. The loop is rcd_core.training.loop and does
not know Ray; training/worker.py runs it on every rank, training/checkpoints.py and faults.py handle lost workers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before the slow imports: the driver imports this file again when its stage runs
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not pipelines/, whose file names are too common
    from pipelines.run.driver import stage_main

    stage_main("base", "reference", "round-*", "target", "target-*", "baseline", "baseline-*")

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.ray_cluster.resources import describe_bundles
from pipelines.run.directory import StageContext
from pipelines.training.faults import Deadline, EndHopelessRuns, attempt_s, user_error
from pipelines.training.job import TrainJob, make_job
from pipelines.training.metrics import join_parts, read_metrics
from pipelines.training.progress import Progress, write_events
from pipelines.training.worker import EXPORTED, train_worker
from rcd_core.errors import UserError
from rcd_core.io import checksums, storage

RESIZE_INTERVAL_S = 60.0  # how often an elastic run checks for room for more workers


def run(ctx: StageContext) -> dict[str, Any]:
    """Train the stage's model and write it to <stage>/model. Summary: digest of the weights, steps, last loss."""
    job = make_job(ctx)
    mark = storage.join(ctx.directory, EXPORTED)
    if not storage.exists(mark):  # else the last job was killed between the export and its manifest
        if job.resume_from is not None and not storage.exists(job.resume_from):
            raise UserError(
                f"{ctx.stage} goes on from {job.resume_from}, which is not there: it is removed when it has been used; "
                "add --redo round-1"
            )
        with Progress(ctx, job.last_step):
            _fit(ctx, job)
    exported = storage.read_json(mark)
    _finish_metrics(ctx, exported["metrics_problem"])
    model = storage.join(ctx.directory, "model")
    digest = checksums.joined([storage.sha256(file) for file in storage.list_files(model, ".safetensors")])
    config = storage.read_json(storage.join(model, "config.json"))
    if not ctx.recipe.target.keep_rounds:
        _remove_used(ctx, job)
    goes_on = {} if job.last_step == job.settings.steps else {"state": _last_state(ctx, job)}
    return {
        **goes_on,
        "steps": job.last_step,
        "loss": None if exported["loss"] is None else round(exported["loss"], 6),  # its line could not be stored
        "rcd": config.get("rcd"),
        "weights_sha256": digest,
        "fingerprint": [digest, config.get("rcd")],
    }


def _last_state(ctx: StageContext, job: TrainJob) -> str:
    """The checkpoint at the end of a round, from which the next one goes on."""
    directory = storage.join(ctx.directory, "ray", ctx.key[:16])
    names = [storage.basename(path) for path in storage.list_directories(directory)]
    return storage.join(directory, max(name for name in names if name.startswith(f"step-{job.last_step:08d}")))


def _remove_used(ctx: StageContext, job: TrainJob) -> None:
    """The signals that the target made for this round, and the state that it went on from."""
    if job.resume_from is None or job.signals is None:
        return
    for name in job.signals["shards"]:
        storage.remove(storage.join(job.signals["directory"], name))
    storage.remove(storage.join(ctx.input_dir(f"round-{(ctx.recipe.round_of(ctx.stage) or 2) - 1}"), "ray"))


def _finish_metrics(ctx: StageContext, problem: str) -> None:
    """Join the metrics and write TensorBoard's events. A problem here never ends a job, and is said once."""
    try:
        join_parts(ctx.directory)
        write_events(storage.join(ctx.directory, "tensorboard"), read_metrics(ctx.directory))
    except Exception as error:
        problem = problem or str(error)
    if problem:
        text = f"  {ctx.stage}: metrics.jsonl or tensorboard/ is incomplete ({problem}); the model is not affected"
        ctx.console.print(text, markup=False, soft_wrap=True)


def _fit(ctx: StageContext, job: TrainJob) -> None:
    """Run the workers to the end. After a failure they start again from the last checkpoint, up to
    resources.max_failures times; training/faults.py says which failures end the training at once."""
    resources = ctx.recipe.resources
    workers = describe_bundles([resources.worker_bundle(ctx.stage)] * resources.worker_counts[0])
    # Ray Train's controller inherits the driver's environment and reads these.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(attempt_s(resources.timeout_s))
    # Its default of 2 s is how long each stage would wait for its end.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Any: Ray's annotations lag behind what it accepts.
    scaling: dict[str, Any] = {
        "num_workers": resources.num_workers,  # a pair makes the run elastic
        "use_gpu": resources.gpus_per_worker > 0,
        "resources_per_worker": resources.worker_bundle(ctx.stage),
        "elastic_resize_monitor_interval_s": RESIZE_INTERVAL_S,
    }
    callbacks: list[Any] = [
        EndHopelessRuns(ctx.stage, ctx.directory),
        Deadline(ctx.stage, workers, resources.timeout_s),
    ]
    files, path = storage.filesystem(storage.join(ctx.directory, "ray"))  # waits for the storage; Ray's own does not
    # NCCL cannot sum offloaded shards and their gradient norm, which are on the CPU.
    offloads = job.settings.cpu_offload and resources.gpus_per_worker > 0
    trainer = TorchTrainer(
        train_worker,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if offloads else None),
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(
            # Ray Train resumes from checkpoints under the same path and name. The name holds the stage's key, so that
            # another recipe does not resume from them.
            name=ctx.key[:16],
            storage_path=path,
            storage_filesystem=files,
            failure_config=FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=job.settings.keep_checkpoints),
            callbacks=callbacks,
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise user_error(error, ctx.stage, resources.max_failures) from None
