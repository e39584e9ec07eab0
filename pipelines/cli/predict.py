"""`rcd predict`: what a plain checkpoint throws away, beside the gains of others that throw away as much. No Ray."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import islice
from typing import Any

from pipelines.cli.calibrate import read_problems
from pipelines.cli.flags import PredictFlags, decode_settings
from pipelines.ray_cluster.hardware import device_of
from rcd_core.decode_settings import DecodeSettings
from rcd_core.errors import UserError
from rcd_core.process import ProcessSettings
from rcd_core.tasks import get_task
from rcd_core.tasks.files import BadRow

_BATCH = 64  # requests whose steps are held at once
_THRESHOLD = 0.9  # with which MEASURED was measured; a stricter one discards more


def predict(flags: PredictFlags) -> int:
    from rcd_core.calibration.information import MEASURED

    found = _measure(flags)
    if flags.json:
        print(json.dumps(found))
        return 0
    value = found.get("information_per_token", 0.0)
    print(f"thrown away: {value:.2f} nats per token, over {found['prompts']} prompts")
    if value:
        print(f"  ({found['discarded']:.2f} discarded predictions of {found['information']:.2f} nats each)")
    print("\nmodels that were measured: nats per token, and tokens per pass with residuals over those without")
    for title, values, gains in MEASURED:
        print(f"  {_span(values):>12}  {_span(gains):>12}  {title}")
    print(f"\n{verdict(value)}")
    return 0


def verdict(value: float) -> str:
    from rcd_core.calibration.information import GAIN, NO_GAIN

    if value <= NO_GAIN:
        return f"No gain is to be expected: models with up to {NO_GAIN:g} nats gained nothing."
    if value >= GAIN:
        return f"A gain is likely: models with {GAIN:g} nats or more gained. They were tiny; a pilot run will tell."
    return f"Not known: no model between {NO_GAIN:g} and {GAIN:g} nats was measured."


def _measure(flags: PredictFlags) -> dict[str, Any]:
    if flags.num_examples < 1:
        raise UserError(f"--num_examples is {flags.num_examples}; it must be at least 1")
    given = decode_settings(flags.decode)
    if given.get("residual"):
        raise UserError("--residual is on, but rcd predict measures plain decoding; leave it out")
    settings, task = DecodeSettings(**{"confidence_threshold": _THRESHOLD, **given}), get_task(flags.task)
    problems = list(islice(read_problems(flags.task, flags.test, flags.field, "--test"), flags.num_examples))
    # Imported here so that wrong flags are refused before torch is loaded.
    from rcd_core.calibration.information import ThrownAway
    from rcd_core.decoding.decoder import Decoder
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
    thrown_away = ThrownAway(model)
    decoder = Decoder(model, observer=thrown_away)
    decode = decoder.infill if task.infill else decoder.generate
    for first in range(0, len(prompts), _BATCH):
        decode(prompts[first : first + _BATCH], settings)
        thrown_away.finish()
    return {"prompts": len(prompts), **thrown_away.report()}


def _span(pair: tuple[float, float]) -> str:
    low, high = (f"{value:.2f}" for value in pair)
    return low if low == high else f"{low} to {high}"
