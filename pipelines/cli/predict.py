"""`rcd predict`: whether residuals may pay, from a plain checkpoint and prompts, beside what others gained. No Ray."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import islice
from typing import Any

from rich.console import Console

from pipelines.cli.calibrate import read_problems
from pipelines.cli.flags import PredictFlags, decode_settings
from pipelines.ray_cluster.hardware import device_of
from pipelines.report.prediction import EXPLANATION, sentence, table
from pipelines.report.render import print_table
from rcd_core.calibration.measured import THRESHOLD
from rcd_core.decode_settings import DecodeSettings
from rcd_core.errors import UserError
from rcd_core.process import ProcessSettings
from rcd_core.tasks import get_task
from rcd_core.tasks.files import BadRow


def predict(flags: PredictFlags) -> int:
    found = _measure(flags)
    if flags.json:
        print(json.dumps(found))
        return 0
    console = Console()
    print_table(console, table(found, "this model"), "what plain decoding throws away", EXPLANATION)
    console.print(sentence(found), markup=False, highlight=False)
    return 0


def _measure(flags: PredictFlags) -> dict[str, Any]:
    if flags.num_examples < 1:
        raise UserError(f"--num_examples is {flags.num_examples}; it must be at least 1")
    given = decode_settings(flags.decode)
    if given.get("residual"):
        raise UserError("--residual is on, but rcd predict measures plain decoding; leave it out")
    settings, task = DecodeSettings(**{"confidence_threshold": THRESHOLD, **given}), get_task(flags.task)
    problems = list(islice(read_problems(flags.task, flags.test, flags.field, "--test"), flags.num_examples))
    # Imported here so that wrong flags are refused before torch is loaded.
    from rcd_core.calibration.information import measure
    from rcd_core.families.loading import load_model
    from rcd_core.text.encoding import Encoder
    from rcd_core.text.tokenizer import load_tokenizer

    ProcessSettings(verify_weights=not flags.no_verify).apply()
    device, dtype = device_of(None, None)
    model = load_model(flags.baseline, dtype=dtype, device=device)
    encoder = Encoder(task, load_tokenizer(flags.baseline), model.info.block_length, model.max_positions)
    prompts = []
    for problem in problems:
        with suppress(BadRow):  # too long
            prompts.append(encoder.test(problem).prompt_ids)
    if not prompts:
        raise UserError(f"--test {flags.test} has no problem of {flags.task} that fits the model")
    return {"prompts": len(prompts), **measure(model, prompts, settings, task.infill)}
