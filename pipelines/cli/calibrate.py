"""`rcd calibrate`: T_res of a checkpoint, stored in it, and what its discarded predictions are worth. Without Ray."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice

from pipelines.calibration.job import CalibrationJob, calibrate_model, store, synthetic_problems
from pipelines.cli.flags import CalibrateFlags, decode_settings
from pipelines.cli.terminal import absolute_path, writable_file
from pipelines.recipe.sources import SYNTHETIC
from pipelines.report.calibration import html_page
from rcd_core.decode_settings import DecodeSettings
from rcd_core.errors import UserError
from rcd_core.families.loading import checkpoint_directory, describe_checkpoint
from rcd_core.io import storage
from rcd_core.noise import NoiseSettings
from rcd_core.process import ProcessSettings
from rcd_core.tasks import Problem, Task, get_task
from rcd_core.tasks.rows import check_columns, read_rows
from rcd_core.training.settings import SignalRule

# Sources of a training whose alpha came from the model itself.
OWN = ("self", "self_same", "on_policy", "loopholing")


def calibrate(flags: CalibrateFlags) -> int:
    job = _job(flags)
    report = writable_file("--report", flags.report) if flags.report else None
    given = read_problems(flags.task, flags.data, flags.field, "--data")
    problems = list(islice(given, 2 * job.num_examples))  # twice as many, as some may be too long
    result = calibrate_model(job, problems, say=lambda text: print(text, file=sys.stderr))
    name = storage.basename(flags.target)
    if report:
        page = html_page(f"{name}: {job.task}", {name: result})
        storage.write_bytes(report, page.encode())
        print(f"report: {report}", file=sys.stderr)
    if job.calibrated and not flags.dry_run:
        print(f"stored: {store(job.checkpoint, result)}", file=sys.stderr)
    if flags.json:
        print(json.dumps(result))
    elif job.calibrated:
        print(f"{result['residual_temperature']:g}")
    else:
        shares = result["discarded"]["overall"]
        print(", ".join(f"top {k}: {100 * v:.1f} %" for k, v in shares.items() if v is not None))
    return 0


def _job(flags: CalibrateFlags) -> CalibrationJob:
    given = decode_settings(flags.decode)
    if "residual_temperature" in given:
        raise UserError("--residual_temperature is the result of rcd calibrate; leave it out")
    if flags.num_examples < 1:
        raise UserError(f"--num_examples is {flags.num_examples}; it must be at least 1")
    calibrated = flags.reference is not None
    decode = DecodeSettings(**given)
    # A hub id becomes its directory in the cache; the result is written there.
    target = flags.target if storage.is_uri(flags.target) else str(checkpoint_directory(flags.target))
    if calibrated and not flags.dry_run and storage.exists(storage.join(f"{absolute_path(target)}/..", "key.json")):
        raise UserError(
            f"--target {flags.target} is the output of a stage, whose T_res is that of the stage calibrate; give "
            "--dry_run, or a copy made by `rcd export`"
        )
    source = describe_checkpoint(target)[0].rcd.get("source")
    if calibrated and source in OWN:
        raise UserError(
            f"--target {flags.target} was trained with residuals of its own predictions (rcd.source {source!r}), so "
            "there is no reference to match and T_res stays 1; leave --reference out to measure what it discards"
        )
    return CalibrationJob(
        stage="target",
        checkpoint=absolute_path(target),
        reference=flags.reference,
        calibrated=calibrated,
        tokenizer=target,
        task=get_task(flags.task).name,
        num_examples=flags.num_examples,
        decode=decode,
        noise=NoiseSettings(seed=flags.noise_seed),
        signal_rule=SignalRule(alpha_temperature=flags.alpha_temperature),
        match=flags.match,
        process=ProcessSettings(verify_weights=not flags.no_verify, deterministic=flags.deterministic),
    )


def read_problems(task_name: str, source: str, field: Sequence[str], flag: str) -> Iterator[Problem]:
    """The problems of a file, or endless synthetic ones. flag: that names the source, for messages."""
    task = get_task(task_name)
    if source == SYNTHETIC:
        yield from synthetic_problems(task_name, 0)
        return
    path = absolute_path(source)
    columns = {name: name for name in task.fields} | _columns(field, task)
    check_columns(path, columns, flag)
    for row in read_rows(path, columns):
        with suppress(UserError):  # skip rows that are not problems of the task
            if row.values is not None:
                yield task.problem(row.values)


def _columns(field: Sequence[str], task: Task) -> dict[str, str]:
    pairs = dict(text.partition("=")[::2] for text in field)
    for name, column in pairs.items():
        if name not in task.fields or not column:
            raise UserError(f"--field {name}={column}: give one of {', '.join(task.fields)} and its column, as a=b")
    return pairs
