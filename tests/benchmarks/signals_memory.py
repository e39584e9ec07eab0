"""Memory that encoding needs in addition to weights and inputs: peak of a fresh process before and after. No Ray.

python -m tests.benchmarks.signals_memory --tokens 4096 --vocab-size 151936 --width 1024
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from rcd_core.signals import ReferenceSignals


def peak_gib() -> float:
    """The largest resident set of this process so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    # In place and in the final dtype, so that creating them has no peak of its own.
    hidden = torch.empty(options.tokens, options.width, dtype=dtype).normal_(generator=generator)
    head = torch.empty(options.vocab_size, options.width, dtype=dtype).normal_(std=0.1, generator=generator)
    hidden[:2] @ head[:64].T  # the matrix library's own buffers
    before, start = peak_gib(), time.process_time()
    ReferenceSignals.from_hidden(hidden, head, options.k)
    seconds = time.process_time() - start
    start = time.process_time()  # CPU time, which other processes disturb less
    tile = (64 << 20) // (4 * options.vocab_size)
    for rows in torch.split(hidden, tile)[:4]:
        torch.mm(rows, head.T)
    product = (time.process_time() - start) / min(4 * tile, options.tokens) * options.tokens
    figures = {
        "gib_before": round(before, 3),
        "extra_gib": round(peak_gib() - before, 3),
        "cpu_s": round(seconds, 2),
        "cpu_s_of_products": round(product, 2),
    }
    print(json.dumps(figures))


def in_fresh_process(*arguments: str) -> dict[str, Any]:
    """The figures from a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.signals_memory", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    main()
