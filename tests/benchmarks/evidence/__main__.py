"""Runs the experiments that compare methods, on rcd_core alone, without Ray.

    python -m tests.benchmarks.evidence run --output DIR [--only sudoku6 chain] [--replicates 3] [--minutes 60]
    python -m tests.benchmarks.evidence report --output DIR [--write tests/benchmarks/evidence/results/second]
    python -m tests.benchmarks.evidence predict --output DIR                 # what bases throw away, beside the gains
    ... run --bases            # the bases only, to measure them before any method is trained
    ... run --done tests/benchmarks/evidence/results/second    # not the replicates that are reported there
    ... --plan tests/benchmarks/evidence/first.yaml       # the first experiment; default: the second

`run` resumes. Several processes may work on different experiments of one directory. Uses a GPU where there is one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from tests.benchmarks.evidence.plan import load_plan
from tests.benchmarks.evidence.report import kept, replicates, report
from tests.benchmarks.evidence.run import Runner, cells
from tests.benchmarks.probe import header

PLAN = Path(__file__).with_name("second.yaml")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("run", "report", "predict"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", help="experiments, in this order; default: all of the plan")
    parser.add_argument("--replicates", type=int, default=1000, help="run at most so many of each")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no cell after this time")
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--write", type=Path, help="report, predict: where results.json and the plots go")
    parser.add_argument("--bases", action="store_true", help="run: train the bases only")
    parser.add_argument("--done", type=Path, help="run: skip the replicates that results.json in this directory has")
    options = parser.parse_args()
    plan = load_plan(options.plan)
    names = options.only or list(plan.experiments)
    if unknown := set(names) - set(plan.experiments):
        parser.error(f"--only {' '.join(unknown)}: the plan has {', '.join(plan.experiments)}")
    if options.action == "report":
        report(plan, names, options.output, options.write)
        return 0
    if options.action == "predict":
        from tests.benchmarks.evidence.predict import predict

        predict(plan, names, options.output, options.write)
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    print(header(), flush=True)
    deadline = time.monotonic() + 60 * options.minutes
    runner = Runner(options.output, device, deadline, lambda text: print(text, flush=True))
    done = {name: replicates(result) for name, result in kept(options.done).items()}
    for cell in cells(plan, names, options.replicates):
        if (cell.base, cell.seed) not in done.get(cell.experiment.name, ()):
            runner.base(cell) if options.bases else runner.run(cell)
    return 0


if __name__ == "__main__":
    sys.exit(main())
