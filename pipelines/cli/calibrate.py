"""`rcd calibrate`: T_res of a checkpoint, stored beside it; and what its discarded predictions are worth. Without Ray.

rcd calibrate --target RCD --reference REF --task gsm8k --data /data/held_out.jsonl
rcd calibrate --target ANY --task gsm8k --data /data/held_out.jsonl --report figures.html     # the paper's Fig. 2 alone
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, get_args

from pipelines.calibration.job import CalibrationJob, calibrate_model, store, synthetic_problems
from pipelines.cli.terminal import refuse_in_one_line
from pipelines.evaluation.decode_flags import add_decode_flags, add_flag, errors_as_flags, given_settings
from pipelines.recipe.rules import SYNTHETIC
from rcd_core.calibration.distance import Match
from rcd_core.decode_settings import DecodeSettings
from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.noise import NoiseSettings
from rcd_core.tasks import Problem, get_task
from rcd_core.tasks.rows import check_columns, read_rows
from rcd_core.training.settings import SignalRule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "rcd calibrate --target CKPT --reference CKPT --task TASK --data FILE [flags]"
    parser.allow_abbrev = False
    refuse_in_one_line(parser, "rcd calibrate")
    models = parser.add_argument_group("checkpoints", "Directories, URIs or hub ids.")
    add_flag(models, "--target", required=True, metavar="CKPT", help="the RCD model; T_res is written into it")
    add_flag(models, "--reference", metavar="CKPT", help="the model whose signals it was trained on; without it, only "
             "discarded predictions are looked at")  # fmt: skip
    what = parser.add_argument_group("held-out training examples", "Never test problems: T_res would be fitted to them")
    add_flag(what, "--task", required=True, help="gsm8k, math, sudoku, qa, ...; a wrong name lists all")
    add_flag(what, "--data", required=True, metavar="FILE", help=".jsonl or .parquet, as data.train; or synthetic")
    add_flag(what, "--field", action="append", default=[], metavar="OURS=COLUMN", help="as data.fields; repeatable")
    add_flag(what, "--num_examples", type=int, default=256, metavar="N", help="the first so many; default: 256")
    add_flag(what, "--match", choices=get_args(Match), default="decoding", metavar="NAME",
             help="ask the reference on the inputs that decoding reaches, or training: on examples under its noise; "
             "default: decoding")  # fmt: skip
    add_flag(what, "--noise_seed", type=int, default=0, metavar="N", help="of the masks on the reference's side")
    add_flag(what, "--alpha_temperature", type=float, default=1.0, metavar="T", help="of the signals; default: 1")
    output = parser.add_argument_group("output", "T_res on stdout, the search on stderr.")
    add_flag(output, "--report", metavar="FILE", help="also write an HTML page with all curves")
    add_flag(output, "--json", action="store_true", help="all numbers as one JSON object on stdout")
    add_flag(output, "--dry_run", action="store_true", help="write nothing beside the checkpoint")
    add_decode_flags(parser)


def run(options: argparse.Namespace) -> int:
    job = _job(options)
    problems = list(islice(_problems(options), 2 * job.num_examples))  # some may be too long
    found = calibrate_model(job, problems, say=lambda text: print(text, file=sys.stderr))
    name = storage.basename(options.target)
    if options.report:
        from pipelines.report.calibration import html_page

        page = html_page(f"{name}: {job.task}", {name: found})
        storage.write_bytes(_absolute(options.report), page.encode())
        print(f"report: {options.report}", file=sys.stderr)
    if job.calibrated and not options.dry_run:
        print(f"stored: {store(job.checkpoint, found)}", file=sys.stderr)
    if options.json:
        print(json.dumps(found))
    elif job.calibrated:
        print(f"{found['residual_temperature']:g}")
    else:
        shares = found["discarded"]["overall"]
        print(", ".join(f"top {k}: {100 * v:.1f} %" for k, v in shares.items() if v is not None))
    return 0


def _job(options: argparse.Namespace) -> CalibrationJob:
    from rcd_core.families.loading import checkpoint_directory

    given = given_settings(options)
    if "residual_temperature" in given:
        raise UserError("--residual_temperature is what rcd calibrate looks for; leave it out")
    if options.num_examples < 1:
        raise UserError(f"--num_examples is {options.num_examples}; it must be at least 1")
    calibrated = options.reference is not None
    with errors_as_flags():
        decode = DecodeSettings(**given)
    # A hub id becomes its directory in the cache, where the result is written too.
    target = options.target if storage.is_uri(options.target) else str(checkpoint_directory(options.target))
    return CalibrationJob(
        stage="target",
        checkpoint=_absolute(target),
        reference=options.reference,
        calibrated=calibrated,
        tokenizer=target,
        task=get_task(options.task).name,
        num_examples=options.num_examples,
        decode=decode,
        noise=NoiseSettings(seed=options.noise_seed),
        signal_rule=SignalRule(alpha_temperature=options.alpha_temperature),
        match=options.match,
    )


def _problems(options: argparse.Namespace) -> Iterator[Problem]:
    if options.data == SYNTHETIC:
        yield from synthetic_problems(options.task, 0)
        return
    task, path = get_task(options.task), _absolute(options.data)
    columns = {name: name for name in task.fields} | _fields(options, task)
    check_columns(path, columns, "--data")
    for row in read_rows(path, columns):
        with suppress(UserError):  # no problem of the task
            if row.values is not None:
                yield task.problem(row.values)


def _fields(options: argparse.Namespace, task: Any) -> dict[str, str]:
    pairs = dict(text.partition("=")[::2] for text in options.field)
    for name, column in pairs.items():
        if name not in task.fields or not column:
            raise UserError(f"--field {name}={column}: give one of {', '.join(task.fields)} and its column, as a=b")
    return pairs


def _absolute(path: str) -> str:
    return path if storage.is_uri(path) else os.path.abspath(os.path.expanduser(path))
