"""Accuracy, tokens per pass, memory and seconds of the demo's models with whole and with quantised weights.

python -m tests.benchmarks.quantised ~/rcd-runs/demo          # a finished run: stages target and baseline
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from rcd_core import Decoder, DecodeSettings, load_model
from rcd_core.decode_settings import Weights
from rcd_core.evaluation.outcomes import collect, curve
from rcd_core.families.quantise import weight_bytes
from rcd_core.tasks import get_task
from rcd_core.text.encoding import Encoder
from rcd_core.text.tokenizer import load_tokenizer
from tests.benchmarks.probe import header
from tests.benchmarks.residual_temperature import decode_rows

WEIGHTS: tuple[Weights, ...] = ("full", "int8", "fp8")  # int4 needs a GPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.6, 0.8, 0.9])
    parser.add_argument("--num_problems", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(header(), flush=True)
    models = {"SeqD": options.run / "baseline" / "model", "RCD": options.run / "target" / "model"}
    task, tokenizer = get_task("sudoku"), load_tokenizer(models["RCD"])
    encoder = Encoder(task, tokenizer, 37, 37)
    tests = [encoder.test(task.problem(task.synthetic(i, "test", 0))) for i in range(options.num_problems)]
    problems = [{**asdict(test), "example_id": str(i)} for i, test in enumerate(tests)]
    print(f"\n{len(problems)} puzzles: accuracy in % @ tokens per pass, by threshold")
    print(f"{'method':6} {'weights':>8} {'kB':>8} {'s':>6}", *(f"{threshold:>14g}" for threshold in options.thresholds))
    found = {}
    for name, path in models.items():
        for weights in WEIGHTS:
            model = load_model(path, weights=weights)
            settings = DecodeSettings(seed=0, residual=name == "RCD", start="zero" if name == "RCD" else None)
            begun, rows = time.perf_counter(), []
            for threshold in options.thresholds:
                at = replace(settings, confidence_threshold=threshold)
                rows += decode_rows(Decoder(model), task, tokenizer, problems, at, name, threshold)
            seconds = time.perf_counter() - begun
            points = [(p.threshold, p.accuracy, p.tokens_per_forward) for p in curve(collect(rows)[name])]
            found[f"{name} {weights}"] = {"bytes": weight_bytes(model), "seconds": seconds, "points": points}
            cells = (f"{100 * accuracy:6.1f} @ {rate:5.2f}" for _, accuracy, rate in points)
            print(f"{name:6} {weights:>8} {weight_bytes(model) / 1e3:>8.0f} {seconds:>6.1f}", *cells, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
