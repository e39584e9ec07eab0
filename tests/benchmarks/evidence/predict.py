"""Does something that plain decoding shows say beforehand how much residuals will gain? One line per base: what the
base throws away (rcd_core/calibration/information.py), decoded without residuals, beside what methods gained from it.

The base, because a user has that before any second training. Only prompts are used, no gold answers.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from rcd_core.calibration import information
from rcd_core.calibration.measured import THRESHOLD
from rcd_core.decode_settings import DecodeSettings
from rcd_core.evaluation.statistics import compare
from rcd_core.families.loading import load_model
from tests.benchmarks.evidence.plan import Experiment, Plan
from tests.benchmarks.evidence.report import BASELINE, LEVEL, load_cells
from tests.benchmarks.evidence.world import World

NUM_PROBLEMS = 512


def predict(plan: Plan, names: list[str], output: Path, write: Path | None) -> None:
    """Print what there is, bases without methods and unfinished replicates too; with `write`, to predict.json there."""
    lines: list[dict[str, Any]] = []
    for name in names:
        experiment = plan.experiments[name]
        gains = _gains(plan, experiment, output)
        for base in sorted({base for base, _ in experiment.replicates}):
            if (output / name / f"base{base}").exists():
                found = measure(experiment, base, output)
                lines.append({"experiment": name, "base": base, **found, "gains": gains.get(base, {})})
                print(json.dumps(lines[-1]), flush=True)
    if write:
        (write / "predict.json").write_text(json.dumps(lines, indent=1) + "\n")


def measure(experiment: Experiment, base: int, output: Path) -> dict[str, Any]:
    """The measures of one base on the first NUM_PROBLEMS test prompts."""
    world, model = World(experiment), load_model(output / experiment.name / f"base{base}")
    settings = DecodeSettings(
        block_length=experiment.block_length,
        max_new_tokens=experiment.max_new_tokens,
        confidence_threshold=THRESHOLD,
        stop_token_ids=model.info.eos_token_ids,
    )
    prompts = [test.prompt_ids for test in world.tests[:NUM_PROBLEMS]]
    return information.measure(model, prompts, settings, world.task.infill)


def _gains(plan: Plan, experiment: Experiment, output: Path) -> dict[int, dict[str, dict[str, float | None]]]:
    """base -> method -> its tokens per pass over SeqD's, at 90 % and at SeqD's best accuracy, mean over the seeds."""
    loaded = load_cells(plan, experiment, output)
    baselines = {part.replicate: part for part in loaded if part.arm.name == BASELINE}
    ratios: dict[int, dict[str, list[tuple[float | None, float | None]]]] = defaultdict(lambda: defaultdict(list))
    for part in loaded:
        if part.start == "zero" and part.replicate in baselines:
            found = compare(baselines[part.replicate].curves, part.curves, accuracy_levels=(LEVEL,))
            both = found.levels[0].ratio.value, found.best.ratio.value
            ratios[part.replicate[0]][part.arm.name].append(both)
    return {
        base: {arm: {"at_90": _mean(of_arm, 0), "at_best": _mean(of_arm, 1)} for arm, of_arm in arms.items()}
        for base, arms in ratios.items()
    }


def _mean(pairs: list[tuple[float | None, float | None]], which: int) -> float | None:
    known = [value for pair in pairs if (value := pair[which]) is not None]
    return round(statistics.fmean(known), 4) if known else None
