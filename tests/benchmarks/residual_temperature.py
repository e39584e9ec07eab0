"""Accuracy against tokens per forward of a target at several T_res, on the test problems of a finished run.

    python -m tests.benchmarks.residual_temperature ~/rcd-runs/demo target --temperatures 0.5 1 1.5

Each T_res is compared with T_res = 1 by paired bootstrap over problems: tokens per forward at equal accuracy.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch

from rcd_core import Decoder, DecodeSettings, load_model
from rcd_core.evaluation.outcomes import collect, curve
from rcd_core.evaluation.statistics import compare, resample
from rcd_core.io import storage
from rcd_core.tasks import get_task
from rcd_core.text.tokenizer import load_tokenizer

THRESHOLDS = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="directory of a finished run")
    parser.add_argument("stage", help="target, target-<variant>")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 1.0, 1.5])
    parser.add_argument("--start", default="zero")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.9], help="accuracies at which rates are compared")
    parser.add_argument("--num-examples", type=int, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    manifest = storage.read_json(f"{options.run}/prepare/manifest.json")
    task = get_task(manifest["material"]["recipe"]["data.task"])
    problems = _problems(options.run, manifest["summary"]["test"])[: options.num_examples]
    model = load_model(f"{options.run}/{options.stage}/model")
    tokenizer = load_tokenizer(f"{options.run}/prepare/tokenizer")
    reference = load_model(f"{options.run}/reference/model") if options.start == "reference" else None
    settings = DecodeSettings(residual=True, start=options.start, seed=0)
    temperatures = sorted({1.0, *options.temperatures})
    rows: list[dict[str, Any]] = []
    for temperature in temperatures:
        for threshold in THRESHOLDS:
            at = replace(settings, residual_temperature=temperature, confidence_threshold=threshold)
            rows += decode_rows(Decoder(model, reference), task, tokenizer, problems, at, f"{temperature:g}", threshold)
    outcomes = collect(rows)
    print(f"{options.stage}, {len(problems)} problems, start {options.start}: accuracy in % @ tokens per forward")
    print("threshold", *(f"{t:>15g}" for t in temperatures), sep="")
    curves = {t: curve(outcomes[f"{t:g}"]) for t in temperatures}
    for i, threshold in enumerate(THRESHOLDS):
        cells = (f"{100 * curves[t][i].accuracy:6.1f} @ {curves[t][i].tokens_per_forward:5.2f}" for t in temperatures)
        print(f"{threshold:<9g}", *cells)
    drawn = {t: resample(outcomes[f"{t:g}"]) for t in temperatures}
    for t in temperatures:
        found = compare(drawn[1.0], drawn[t], accuracy_levels=options.levels, measure="tokens_per_forward")
        for level in found.levels:
            ratio = level.ratio
            shown = "not crossed" if ratio.value is None else f"{ratio.value:.3f}"
            if ratio.low is not None:
                shown += f" ({ratio.low:.3f} to {ratio.high:.3f})"
            print(f"tokens per forward at {level.accuracy:.0%}, T_res {t:g} over T_res 1: {shown}")


def _problems(run: str, names: list[str]) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return [row for name in names for row in pq.read_table(f"{run}/prepare/test/{name}").to_pylist()]


def decode_rows(
    decoder: Decoder,
    task: Any,
    tokenizer: Any,
    problems: list[dict[str, Any]],
    settings: DecodeSettings,
    arm: str,
    threshold: float,
) -> list[dict[str, Any]]:
    decode = decoder.infill if task.infill else decoder.generate
    rows = []
    for problem, output in zip(problems, decode([p["prompt_ids"] for p in problems], settings), strict=True):
        ids = output.canvas_ids if task.infill else output.token_ids
        text = str(tokenizer.decode(ids, skip_special_tokens=not task.infill))
        rows.append(
            {
                "arm": arm,
                "threshold": threshold,
                "example_id": problem["example_id"],
                "correct": task.grade(problem["prompt"], text, problem["answer"]),
                "tokens": len(output.token_ids),
                **vars(output.num_forwards),
            }
        )
    return rows


if __name__ == "__main__":
    main()
