"""What a calibration does, without Ray: the stage `calibrate` sends it to its workers, `rcd calibrate` runs it here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from pipelines.ray_cluster.hardware import worker_device
from rcd_core.calibration.distance import Match
from rcd_core.decode_settings import DecodeSettings
from rcd_core.errors import UserError
from rcd_core.families.files import CALIBRATION_FILE
from rcd_core.io import storage
from rcd_core.noise import NoiseSettings
from rcd_core.tasks import Problem, check_gradable, get_task
from rcd_core.training.settings import SignalRule

_FIRST_SYNTHETIC = 1 << 40  # of the training split, far beyond what any training makes


@dataclass(frozen=True, kw_only=True)
class CalibrationJob:
    """One model. reference: the checkpoint it was trained with, None where it had none. calibrated: it feeds back;
    of another model only the discarded predictions are looked at. pad_multiple, max_length: of training examples,
    None: the model's block length, and its positions. run_code: completions that are programs may be run."""

    stage: str
    checkpoint: str
    reference: str | None
    calibrated: bool
    tokenizer: str
    task: str
    num_examples: int
    decode: DecodeSettings
    noise: NoiseSettings = NoiseSettings()
    signal_rule: SignalRule = SignalRule()
    match: Match = "decoding"
    pad_multiple: int | None = None
    max_length: int | None = None
    run_code: bool = False
    threads: int | None = None


def calibrate_model(
    job: CalibrationJob, problems: Sequence[Problem], say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The model's part of calibration.json. A pure function; on a GPU where there is one."""
    from rcd_core.calibration.calibrate import calibrate, diagnose
    from rcd_core.calibration.training_alphas import encode
    from rcd_core.decoding.request import resolve_settings
    from rcd_core.families.loading import load_model
    from rcd_core.text.encoding import Encoder
    from rcd_core.text.tokenizer import load_tokenizer

    if job.run_code:
        os.environ["RCD_RUN_CODE"] = "1"  # of this process only
    device, dtype = worker_device(job.threads)
    model = load_model(job.checkpoint, dtype=dtype, device=device)
    reference = load_model(job.reference, dtype=dtype, device=device) if job.reference else None
    encoder = Encoder(
        get_task(job.task),
        load_tokenizer(job.tokenizer),
        job.pad_multiple or model.info.block_length,
        job.max_length or model.max_positions,
    )
    examples = encode(encoder, problems, job.num_examples)
    if not job.calibrated:
        plain = resolve_settings(job.decode, model, False)
        return diagnose(model, None, examples, plain, encoder)
    return calibrate(
        model,
        reference,
        examples,
        encoder,
        job.decode,
        noise=job.noise,
        signal_rule=job.signal_rule,
        match=job.match,
        grade=_gradable(job.task),
        say=say,
    )


def store(checkpoint: str, found: dict[str, Any]) -> str:
    """Put T_res beside a checkpoint's weights, wherever they lie; the file's name."""
    from rcd_core.calibration.calibrate import stored

    path = storage.join(checkpoint, CALIBRATION_FILE)
    storage.write_json(path, stored(found))
    return path


def synthetic_problems(task: str, seed: int) -> Iterator[Problem]:
    """Endless, of the training split, and in nobody's training data."""
    of = get_task(task)
    return (of.problem(of.synthetic(_FIRST_SYNTHETIC + i, "train", seed)) for i in count())


def _gradable(task: str) -> bool:
    with suppress(UserError):
        check_gradable(task)
        return True
    return False
