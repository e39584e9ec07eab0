"""One Ray Train worker: loads or creates the model, opens the rows, runs the loop; rank 0 writes the result."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ray import train as ray_train
from ray.train.torch import get_device

from pipelines.ray_cluster.hardware import device_of
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.job import TrainJob
from pipelines.training.metrics import MetricsLog
from rcd_core.attention.backends import backend_key
from rcd_core.errors import UserError
from rcd_core.families.added import take_added
from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.convert import converted
from rcd_core.families.loading import load_model, new_model
from rcd_core.io import storage
from rcd_core.io.retries import be_patient
from rcd_core.noise import seed_of
from rcd_core.text.tokenizer import load_tokenizer, mask_token_id, stop_token_ids
from rcd_core.training.data.batches import collate
from rcd_core.training.data.examples import ExampleSource, Limits
from rcd_core.training.data.rows import RowSource, TrainingRow
from rcd_core.training.data.signal_cache import SignalSource, require_match
from rcd_core.training.loop import Callbacks, Validation, train
from rcd_core.training.lora import export_adapter, merged
from rcd_core.training.objective import reference_signals
from rcd_core.training.own_signals import OwnSignals

EXPORTED = "exported.json"  # in the stage's directory once its model is complete


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train calls this on every rank. An error that leaves it carries its traceback, which Ray would drop."""
    job: TrainJob = config["job"]
    be_patient()
    try:
        _train(job)
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{job.stage}: the device is out of memory ({str(error).splitlines()[0]}); lower train.micro_batch_size or "
            "train.pack_length, set train.activation_checkpointing, or use train.strategy fsdp2 on more workers; "
            "`rcd train plan` says what fits"
        ) from None
    except Exception as error:
        error.add_note(f"in a training worker:\n{traceback.format_exc()}")
        raise


def _train(job: TrainJob) -> None:
    job.process.apply()
    context = ray_train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    # dtype: the one in which the stage `signals` would have run the reference.
    kind, dtype = device_of(job.gpus, job.threads)
    device = (
        get_device() if kind == "cuda" else torch.device(kind)
    )  # Ray's: its workers on a node see each other's GPUs
    if storage.exists(storage.join(job.directory, EXPORTED)):
        return  # a worker was lost after the export
    model = start_model(job).requires_grad_(True)  # adapters freeze it again
    model.config._attn_implementation = backend_key(job.settings.attention, device)
    if job.settings.strategy != "fsdp2":  # fsdp2 moves the model to the device in shards
        model = model.to(device)
    # The base of adapters is in memory already.
    own_reference = job.settings.lora is not None and job.reference is not None and job.reference == job.start
    needed = job.reference if not own_reference else None
    reference = load_model(needed, device=device, dtype=dtype) if needed else None
    with Checkpoints(job.stage, job.directory) as checkpoints:
        resume, step = checkpoints.resume()
        if resume is None and job.resume_from is not None:
            resume, step = checkpoints.take_over(job.resume_from)
        metrics = MetricsLog(job.run, job.stage, job.directory, rank, step)

        def checkpoint(step: int, save: Callable[[Path], None]) -> None:
            metrics.flush()
            checkpoints.write(step, save)

        weights = train(
            model,
            _rows(job, model),
            job.settings,
            job.residual,
            job.block_length,
            Callbacks(log=metrics.log, checkpoint=checkpoint, loaded=checkpoints.loaded),
            reference=reference,
            own_reference=own_reference,
            signal_rule=job.signal_rule,
            noise=job.noise,
            block_warmup=job.convert.block_warmup if job.convert else 0.0,
            validation=validation(job, model, rank, world_size, dtype, device),
            resume=resume,
            stop_at=job.last_step,
            device=device,
        )
    if rank == 0:
        _export(job, _finished(job, model, weights))
        mark = {"loss": metrics.last.get("loss"), "metrics_problem": metrics.close()}
        storage.write_json(storage.join(job.directory, EXPORTED), mark)


def _finished(job: TrainJob, model: DiffusionModel, weights: dict[str, torch.Tensor]) -> DiffusionModel:
    """The trained model. Adapters are also written by themselves, to <stage>/adapter."""
    if job.settings.lora is None:
        return model.with_weights(weights)
    whole = start_model(job)
    take_added(whole, weights)
    with tempfile.TemporaryDirectory() as directory:
        base = job.start if isinstance(job.start, str) and not job.convert else None
        export_adapter(Path(directory), whole, weights, job.settings.lora, base)
        load_tokenizer(job.tokenizer).save_pretrained(directory)
        storage.upload_dir(directory, storage.join(job.directory, "adapter"))
    return merged(whole, weights, job.settings.lora)


def start_model(job: TrainJob) -> DiffusionModel:
    """The model that training starts from, on the CPU in fp32."""
    if isinstance(job.start, str) and job.convert:
        tokenizer = load_tokenizer(job.tokenizer)
        kind: Any = {"shift": job.convert.shift, "attention": job.convert.attention}
        model = converted(job.start, tokenizer, job.block_length, **kind, dtype=torch.float32)
    elif isinstance(job.start, str):
        model = load_model(job.start, dtype=torch.float32)
    else:
        tokenizer = load_tokenizer(job.tokenizer)
        info = CheckpointInfo(
            mask_token_id=mask_token_id(tokenizer),
            eos_token_ids=stop_token_ids(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            block_length=job.block_length,
        )
        seed = seed_of(job.settings.seed, job.stage, "weights")
        model = new_model(job.start, vocab_size=len(tokenizer), info=info, seed=seed)
    model.info.block_length = job.block_length
    if job.residual.feeds_back:
        model.info.rcd = {
            "start": "zero" if job.residual.source == "loopholing" else model.default_start,
            "residual_temperature": 1.0,
            "block_length": job.block_length,
            "alpha": job.residual.alpha,
            "alpha_scale": job.residual.alpha_scale,
            "residual_dropout": job.residual.dropout,
            "source": job.residual.source,
        }
    else:  # T_res of a start that was calibrated is not that of the new weights
        kept = model.info.rcd.items()
        model.info.rcd = {k: v for k, v in kept if k not in ("calibration", "residual_temperature")}
    return model


def _rows(job: TrainJob, model: DiffusionModel) -> RowSource:
    if job.signals is None:
        return ExampleSource(job.examples, job.noise, job.chunks, _limits(model))
    facts = {name: getattr(model, name) for name in ("family", "vocab_size", "mask_token_id")}
    require_match(job.signals, facts, "the target's")
    return SignalSource(job.signals["directory"], job.signals)


def _limits(model: DiffusionModel) -> Limits:
    return Limits(model.vocab_size, model.max_positions)


def validation(
    job: TrainJob, model: DiffusionModel, rank: int, world_size: int, dtype: torch.dtype | None, device: torch.device
) -> Validation | None:
    """The held-out examples under the first draw of the training noise, or None if there are none.

    If training uses cached signals, this rank's rows get signals of the reference, loaded on `device` in `dtype`.
    """
    if not job.validation:
        return None
    examples = ExampleSource(job.validation, job.noise, limits=_limits(model))
    num_rows = examples.order.num_examples
    if job.signals is None:
        return Validation(examples, num_rows)
    reference = load_model(job.signals["reference_checkpoint"], device=device, dtype=dtype)
    rows = {}
    own = None
    if job.signals.get("own"):
        own = OwnSignals(reference, job.residual, job.signal_rule, job.noise, job.block_length, job.settings.seed)
    for row in (examples.row(index) for index in range(rank, num_rows, world_size)):
        if own is not None:
            _, signals = own([row])
            rows[row.index] = replace(row, signals=signals.to("cpu"))
            continue
        batch, _ = collate(
            [row],
            mask_token_id=model.mask_token_id,
            pad_token_id=model.info.pad_token_id,
            block_length=job.block_length,
            noise=job.noise,
        )
        signals = reference_signals(reference, batch.to(device), job.signal_rule)
        rows[row.index] = replace(row, signals=signals.to("cpu"))
    return Validation(RowsInMemory(rows), num_rows)


class RowsInMemory:
    """A row source of rows by number."""

    def __init__(self, rows: dict[int, TrainingRow]) -> None:
        self.rows = rows

    def row(self, index: int) -> TrainingRow:
        return self.rows[index]


def _export(job: TrainJob, model: DiffusionModel) -> None:
    """Write <stage>/model. On a file system a complete copy is renamed, so that no reader sees half a model."""
    path = storage.join(job.directory, "model")
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, tokenizer=load_tokenizer(job.tokenizer))
        storage.remove(path)
        if storage.is_uri(job.directory):
            storage.upload_dir(directory, path)
        else:
            storage.upload_dir(directory, path + ".partial")
            storage.rename(path + ".partial", path)
