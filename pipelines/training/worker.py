"""One Ray Train worker: build or load the model, find the rows, run the loop, let rank 0 write the result."""

from __future__ import annotations

import tempfile
import traceback
from dataclasses import dataclass
from typing import Any

from pipelines.training.checkpoints import Checkpoints
from pipelines.training.metrics import MetricsLog
from rcd_core.errors import UserError
from rcd_core.families.config import ModelConfig
from rcd_core.io import storage
from rcd_core.noise import NoiseSettings, hash_key
from rcd_core.residual import ResidualSettings
from rcd_core.training.data.examples import Chunks, ExampleSource, Limits
from rcd_core.training.data.rows import RowSource, TrainingRow
from rcd_core.training.data.signal_cache import SignalSource, require_match
from rcd_core.training.settings import SignalRule, TrainSettings

SEED_BITS = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """All that a worker needs, and nothing that lives in the driver."""

    run: str
    stage: str
    directory: str
    start: str | ModelConfig  # a checkpoint, or the sizes of a fresh model
    tokenizer: str
    examples: tuple[str, ...]
    chunks: Chunks
    validation: tuple[str, ...]  # files of the held-out examples; none without validation
    signals: dict[str, Any] | None  # summary of the signals stage, with its directory
    reference: str | None  # only where the reference runs online
    signal_rule: SignalRule
    noise: NoiseSettings
    block_length: int
    settings: TrainSettings
    residual: ResidualSettings
    threads: int


def train_worker(config: dict[str, Any]) -> None:
    """What Ray Train calls on every rank. An error that leaves it carries its traceback, which Ray would drop."""
    import torch

    job: TrainJob = config["job"]
    try:
        _train(job)
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{job.stage}: the device's memory does not suffice ({str(error).splitlines()[0]}); lower "
            "train.micro_batch_size or train.pack_length, set train.activation_checkpointing, or use train.strategy "
            "fsdp2 on more workers; `rcd train plan` says what fits"
        ) from None
    except Exception as error:
        error.add_note(f"in a training worker:\n{traceback.format_exc()}")
        raise


def _train(job: TrainJob) -> None:
    import torch
    from ray import train as ray_train
    from ray.train.torch import get_device

    from rcd_core.families.loading import load_model
    from rcd_core.training.loop import Callbacks, train

    context = ray_train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(job.threads)
    model = start_model(job).requires_grad_(True)
    if job.settings.strategy != "fsdp2":  # which takes it to the device in shards
        model = model.to(device)
    # In the dtype in which the stage `signals` would have run it.
    dtype = torch.bfloat16 if device.type == "cuda" else None
    reference = load_model(job.reference, device=device, dtype=dtype) if job.reference else None
    with Checkpoints(job.stage, job.directory) as checkpoints:
        resume, step = checkpoints.resume()
        weights = train(
            model,
            _rows(job, model),
            job.settings,
            job.residual,
            job.block_length,
            Callbacks(log=MetricsLog(job.run, job.stage, job.directory, rank, step).log, checkpoint=checkpoints.write),
            reference=reference,
            signal_rule=job.signal_rule,
            noise=job.noise,
            validation=validation(job, model, rank, world, dtype, device),
            resume=resume,
            device=device,
        )
    if rank == 0:
        _export(job, model.with_weights(weights))


def start_model(job: TrainJob) -> Any:
    """The model as training begins with it, on the CPU in fp32."""
    import torch

    from rcd_core.families.base import CheckpointInfo
    from rcd_core.families.loading import load_model, new_model
    from rcd_core.text.tokenizer import load_tokenizer, mask_token_id, stop_token_ids

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
    if job.residual.feeds_back:
        model.info.rcd = {
            "start": model.default_start,
            "residual_temperature": 1.0,
            "block_length": job.block_length,
            "alpha": job.residual.alpha,
            "alpha_scale": job.residual.alpha_scale,
            "residual_dropout": job.residual.dropout,
        }
    return model


def _rows(job: TrainJob, model: Any) -> RowSource:
    if job.signals is None:
        return ExampleSource(job.examples, job.noise, job.chunks, _limits(model))
    facts = {name: getattr(model, name) for name in ("family", "vocab_size", "mask_token_id")}
    require_match(job.signals, facts, "the target's")
    return SignalSource(job.signals["directory"], job.signals)


def _limits(model: Any) -> Limits:
    return Limits(model.vocab_size, model.max_positions)


def validation(job: TrainJob, model: Any, rank: int, world: int, dtype: Any, device: Any = None) -> Any:
    """The held-out examples under the first draw of the training noise; with the reference's signals where the training
    has cached ones."""
    from rcd_core.training.loop import Validation

    if not job.validation:
        return None
    examples = ExampleSource(job.validation, job.noise, limits=_limits(model))
    count = examples.order.num_examples
    if job.signals is None:
        return Validation(examples, count)
    mine = [examples.row(g) for g in range(rank, count, world)]
    return Validation(HeldOut(_with_signals(job, model, mine, dtype, device or model.device)), count)


class HeldOut:
    """Rows kept in memory, by number."""

    def __init__(self, rows: list[TrainingRow]) -> None:
        self.rows = {row.index: row for row in rows}

    def row(self, index: int) -> TrainingRow:
        return self.rows[index]


def _with_signals(job: TrainJob, model: Any, rows: list[TrainingRow], dtype: Any, device: Any) -> list[TrainingRow]:
    """This rank's held-out rows with signals. The reference is here only for as long as that takes."""
    from dataclasses import replace

    from rcd_core.families.loading import load_model
    from rcd_core.training.data.batches import collate
    from rcd_core.training.objective import reference_signals

    assert job.signals is not None
    reference = load_model(job.signals["reference_checkpoint"], device=device, dtype=dtype)
    found = []
    for row in rows:
        batch, _ = collate(
            [row],
            mask_token_id=model.mask_token_id,
            pad_token_id=model.info.pad_token_id,
            block_length=job.block_length,
        )
        signals = reference_signals(reference, batch.to(device), **vars(job.signal_rule))
        found.append(replace(row, signals=signals.to("cpu")))
    return found


def _export(job: TrainJob, model: Any) -> None:
    """Written whole under a scratch name, then renamed: a half-written model is never found."""
    from rcd_core.text.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, tokenizer=load_tokenizer(job.tokenizer))
        storage.remove(storage.join(job.directory, "model"))
        if storage.is_uri(job.directory):
            storage.upload_dir(directory, storage.join(job.directory, "model"))
        else:
            storage.upload_dir(directory, storage.join(job.directory, "model.partial"))
            storage.rename(storage.join(job.directory, "model.partial"), storage.join(job.directory, "model"))
