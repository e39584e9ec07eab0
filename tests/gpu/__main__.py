"""One check of everything on a real GPU, in five minutes.

    python -m tests.gpu --out DIR [--parts backends,captured] [--minutes 5]
    python -m tests.gpu --out DIR --rehearse        the same script on a CPU, in tiny shapes

Needs torch, transformers, numpy and safetensors; no Ray. Parts run in order of importance, each with a time limit of
its own. After each part its results are in DIR as JSON. A part that fails is recorded with its traceback, and the next
one runs. Exit status 1: a part failed, or something that must be equal was not.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.probe import hardware
from tests.gpu import equality, speed, training
from tests.gpu.common import Run

GRACE = 10.0  # seconds that a part may run past its limit
PARTS: dict[str, tuple[Callable[[Run], Any], float]] = {  # with seconds at most
    "backends": (equality.backends, 30),
    "captured": (equality.captured, 40),
    "precision": (equality.precision, 15),
    "resume": (equality.resume, 20),
    "decoding": (speed.first_sizes, 90),
    "training": (training.utilisation, 60),
    "signals": (training.signals, 20),
    "all_sizes": (speed.all_sizes, 600),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)}; default: all, in order")
    parser.add_argument("--minutes", type=float, default=5.0, help="for all parts together")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, in tiny shapes")
    options = parser.parse_args()
    names = options.parts.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no GPU is available; --rehearse runs this script on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", 0)
    print(hardware(), flush=True)
    end = time.perf_counter() + 60 * options.minutes
    results = []
    for name in names:
        function, seconds = PARTS[name]
        results.append(run_part(name, function, Run(device, options.rehearse, min(end, time.perf_counter() + seconds))))
        (options.out / f"{name}.json").write_text(json.dumps(results[-1], indent=1))
        print(f"{name}: {results[-1]['seconds']:.1f} s{' FAILED' if failures(results[-1]) else ''}", flush=True)
    table = "\n".join(line for result in results for line in lines_of(result))
    note = "rehearsal on a CPU in tiny shapes: the figures mean nothing\n\n" if options.rehearse else ""
    (options.out / "table.md").write_text(f"{hardware()}\n\n{note}{table}\n")
    print(table)
    return int(any(failures(result) for result in results))


class OutOfTime(Exception):
    pass


def run_part(name: str, function: Callable[[Run], Any], run: Run) -> dict[str, Any]:
    """The part's results, or its traceback. Interrupts it some seconds after its end."""
    result: dict[str, Any] = {"part": name, "hardware": hardware(), "rehearsal": run.rehearse}
    begun = time.perf_counter()

    def interrupt(*_: Any) -> None:
        raise OutOfTime(f"{name} ran past its time limit")

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(0.0, run.left) + GRACE)
    try:
        result["results"] = function(run) if run.left > 0 else "left out: no time"
    except Exception:
        result["error"] = traceback.format_exc()
        print(result["error"], file=sys.stderr)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    run.release()
    return result | {"seconds": time.perf_counter() - begun}


def failures(result: dict[str, Any]) -> list[str]:
    """The part itself, or the checks in it that do not hold."""
    if "error" in result:
        return [result["part"]]
    found = result["results"]
    return [key for key, value in found.items() if value is False] if isinstance(found, dict) else []


def lines_of(result: dict[str, Any]) -> list[str]:
    """The part as lines of Markdown."""
    lines = [f"## {result['part']}, {result['seconds']:.0f} s", ""]
    if "error" in result:
        return [*lines, "failed: " + result["error"].strip().splitlines()[-1], ""]
    found = result["results"]
    if isinstance(found, str):
        return [*lines, found, ""]
    rows = found if isinstance(found, list) else [{"figure": k, "value": v} for k, v in found.items()]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows), ""]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " to ".join(_cell(v) for v in value)
    return "" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
