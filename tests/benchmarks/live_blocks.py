"""Accuracy against tokens per pass with several live blocks (D2F), SeqD and RCD, on the word problems of recipe
arithmetic.

    python -m tests.benchmarks.live_blocks ~/rcd-runs/arithmetic          # a finished run: stages target and baseline
    python -m tests.benchmarks.live_blocks DIR --steps 800 2000 500       # trains models here, or takes those of DIR
    python -m tests.benchmarks.live_blocks DIR --layout multi_block       # both models learn several live blocks

--steps: of the reference, of the base, and of each of the two models that start from the base. A pass of D2F with a
short prompt is a denoising pass, so the passes that are counted are all passes but the prefill of plain decoding.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from rcd_core import Decoder, DecodeSettings, load_model
from rcd_core.evaluation.outcomes import collect, curve
from rcd_core.families.base import DiffusionModel
from rcd_core.noise import NoiseSettings
from rcd_core.tasks import get_task
from rcd_core.text.encoding import Encoder
from rcd_core.text.tokenizer import load_tokenizer
from rcd_core.training.settings import ResidualSettings
from tests.benchmarks.probe import header
from tests.benchmarks.residual_temperature import decode_rows
from tests.benchmarks.signals_data import ARITHMETIC, make, train_model

THRESHOLDS = (0.5, 0.7, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, nargs=3, default=ARITHMETIC.steps)
    parser.add_argument("--layout", choices=("single", "multi_block"), default="single", help="noise.layout of both")
    parser.add_argument("--live", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    parser.add_argument("--add", type=float, default=0.1, help="block_add_threshold")
    parser.add_argument("--activate", type=float, default=0.95, help="decoded_token_threshold")
    parser.add_argument("--num_problems", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(header(), flush=True)
    seqd, target = _models(options.directory, tuple(options.steps), options.layout)
    task, tokenizer = get_task("arithmetic"), load_tokenizer(seqd)
    encoder = Encoder(task, tokenizer, ARITHMETIC.block_length, ARITHMETIC.max_length)
    tests = [encoder.test(task.problem(task.synthetic(i, "test", 0))) for i in range(options.num_problems)]
    problems = [{**asdict(test), "example_id": str(i)} for i, test in enumerate(tests)]
    plain = DecodeSettings(max_new_tokens=64, seed=0)
    several = replace(plain, block_add_threshold=options.add, decoded_token_threshold=options.activate)
    methods = {
        "SeqD": (load_model(seqd), several),
        "RCD": (load_model(target), replace(several, residual=True, start="zero")),
    }
    print(f"\n{len(problems)} problems: accuracy in % @ tokens per pass, by threshold")
    print(f"{'method':6} {'live blocks':>11}", *(f"{threshold:>14g}" for threshold in options.thresholds))
    found: dict[str, list[tuple[float, float, float]]] = {}
    for name, (model, settings) in methods.items():
        for live in (None, *options.live):
            rows: list[dict[str, Any]] = []
            for threshold in options.thresholds:
                at = replace(settings, max_live_blocks=live, confidence_threshold=threshold)
                rows += decode_rows(Decoder(model), task, tokenizer, problems, at, name, threshold)
            points = [(p.threshold, p.accuracy, p.tokens_per_forward) for p in curve(collect(rows)[name])]
            found[f"{name} {live or 'plain'}"] = points
            cells = (f"{100 * accuracy:6.1f} @ {rate:5.2f}" for _, accuracy, rate in points)
            print(f"{name:6} {live or 'plain':>11}", *cells, flush=True)
    print(json.dumps(found))


def _models(directory: Path, steps: tuple[int, int, int], layout: Literal["single", "multi_block"]) -> tuple[str, str]:
    """Directories of SeqD and of the RCD model."""
    if (directory / "recipe.yaml").exists():
        return str(directory / "baseline" / "model"), str(directory / "target" / "model")
    baseline, target = directory / "baseline", directory / "target"
    if not (baseline / "config.json").exists():
        recipe = replace(ARITHMETIC, steps=steps)
        noise = NoiseSettings(layout=layout, block_length=None if layout == "single" else ARITHMETIC.block_length)
        made = make(recipe, directory, None, 16384, noise)
        model: DiffusionModel = load_model(made.start)
        train_model(model, made.files, made.noise, recipe, steps[2], ResidualSettings(source="none"), None)
        model.save_pretrained(baseline, load_tokenizer(made.start))
    return str(baseline), str(target)


if __name__ == "__main__":
    main()
