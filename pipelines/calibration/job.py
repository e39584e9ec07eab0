"""One calibration of T_res, without Ray. The stage `calibrate` runs it in Ray tasks, `rcd calibrate` in its process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from pipelines.ray_cluster.hardware import device_of
from rcd_core.calibration.distance import Match
from rcd_core.decode_settings import DecodeSettings
from rcd_core.errors import UserError
from rcd_core.families.files import CALIBRATION_FILE
from rcd_core.io import storage
from rcd_core.noise import NoiseSettings
from rcd_core.process import ProcessSettings
from rcd_core.tasks import Problem, check_gradable, get_task
from rcd_core.training.settings import SignalRule

_FIRST_SYNTHETIC = 1 << 40  # index in the training split, far beyond those that any training uses


@dataclass(frozen=True, kw_only=True)
class CalibrationJob:
    """One model to calibrate.

    reference: the checkpoint whose signals the model was trained on, None if there were none.
    calibrated: the model feeds residuals back; for others only their discarded predictions are measured.
    pad_multiple, max_length: of training examples; by default the model's block length and number of positions.
    run_code: the grader may run completions that are programs. gpus, threads: as in hardware.device_of.
    """

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
    gpus: float | None = None
    process: ProcessSettings = ProcessSettings()


def calibrate_model(
    job: CalibrationJob, problems: Sequence[Problem], say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """The model's part of calibration.json, a pure function of the job and the problems."""
    # Imported here so that `rcd calibrate --help` starts without torch and transformers.
    from rcd_core.calibration.calibrate import calibrate, diagnose
    from rcd_core.calibration.training_alphas import encode_examples
    from rcd_core.decoding.request import resolve_settings
    from rcd_core.families.loading import load_model
    from rcd_core.text.encoding import Encoder
    from rcd_core.text.tokenizer import load_tokenizer

    if job.run_code:
        os.environ["RCD_RUN_CODE"] = "1"  # in this process only
    job.process.apply()
    device, dtype = device_of(job.gpus, job.threads)
    model = load_model(job.checkpoint, dtype=dtype, device=device)
    reference = load_model(job.reference, dtype=dtype, device=device) if job.reference else None
    encoder = Encoder(
        get_task(job.task),
        load_tokenizer(job.tokenizer),
        job.pad_multiple or model.info.block_length,
        job.max_length or model.max_positions,
    )
    examples = encode_examples(encoder, problems, job.num_examples)
    if not job.calibrated:
        return diagnose(model, None, examples, resolve_settings(job.decode, model, False), encoder)
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
        log=say,
    )


def store(checkpoint: str, result: dict[str, Any]) -> str:
    """Write T_res next to a checkpoint's weights, where decoding reads it. Returns the file's path."""
    from rcd_core.calibration.calibrate import stored_calibration  # torch, as above

    path = storage.join(checkpoint, CALIBRATION_FILE)
    storage.write_json(path, stored_calibration(result))
    return path


def synthetic_problems(task: str, seed: int) -> Iterator[Problem]:
    """Endless problems of the training split that no training uses."""
    generator = get_task(task)
    return (generator.problem(generator.synthetic(_FIRST_SYNTHETIC + i, "train", seed)) for i in count())


def _gradable(task: str) -> bool:
    with suppress(UserError):
        check_gradable(task)
        return True
    return False
