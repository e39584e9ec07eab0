"""Peak memory of block-diffusion attention in training: one layer, forward and backward, [noisy | clean] of L tokens.

    python -m tests.benchmarks.attention [--lengths 1024,2048,4096,8192] [--heads 4] [--repeats 3]

Compares, each in its own process, `tiled` (sdpa's way for long rows: tiles of queries with the keys they see) and
`mask` (one mask of all pairs); on a GPU also `flex`. Extra memory is the peak above the tensors that every method needs
(inputs and their gradients).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from rcd_core.attention import backends as attention
from rcd_core.attention.layouts import block_diffusion
from tests.benchmarks.probe import header

BLOCK_LENGTH, HEAD_DIM = 32, 128
METHODS = ("tiled", "mask")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--heads", type=int, default=4, help="query heads; half as many of keys")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.heads)))
        return
    print(header())
    gpu = torch.cuda.is_available()
    rows = []
    for length in map(int, options.lengths.split(",")):
        for method in (*METHODS, "flex") if gpu else METHODS:
            runs = [_child(method, length, options.heads) for _ in range(options.repeats)]
            row = {"method": method, "length": length, "repeats": len(runs)}
            for name in ("extra_mib", "seconds"):
                values = [r[name] for r in runs]
                row |= {name: statistics.median(values), f"{name}_spread": [min(values), max(values)]}
            rows.append(row)
            print(
                f"L {length:5d}  {method:5s}  extra {row['extra_mib']:8.1f} MiB  {row['seconds']:6.2f} s"
                f"  (of {len(runs)}: {row['seconds_spread'][0]:.2f} to {row['seconds_spread'][1]:.2f} s)",
                flush=True,
            )
    print(json.dumps({"attention": rows, "gpu": torch.cuda.get_device_name() if gpu else "not measured"}))


def _child(method: str, length: int, heads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.attention", "--one", method, str(length), "--heads", str(heads)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def measure(method: str, length: int, heads: int) -> dict[str, float]:
    """Extra MiB and seconds of one forward and backward; two samples are packed into the row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    half = length // 2
    samples = (torch.arange(length) >= half).long()[None].to(device)
    positions = (torch.arange(length) % half)[None].to(device)
    masked = (torch.arange(length) % 2 == 0)[None].to(device)
    layout = block_diffusion(masked, samples, positions, BLOCK_LENGTH).layout
    num_tokens = layout.shape[1]
    q, k, v = (
        torch.randn(1, h, num_tokens, HEAD_DIM, device=device, dtype=dtype, requires_grad=True)
        for h in (heads, heads // 2, heads // 2)
    )
    for tensor in (q, k, v):
        tensor.grad = torch.zeros_like(tensor)
    attention.DENSE_PAIRS = 0 if method == "tiled" else 1 << 62
    function = attention.flex_attention if method == "flex" else attention.sdpa_attention
    _reset_peak(device)
    before = _peak_bytes(device)
    start = time.perf_counter()
    out = function(q, k, v, layout, HEAD_DIM**-0.5)
    out.sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    # Every method needs the result and its gradient.
    extra = _peak_bytes(device) - before - 2 * out.numel() * out.element_size()
    return {"extra_mib": round(extra / 2**20, 1), "seconds": round(seconds, 3)}


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current resident memory


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


if __name__ == "__main__":
    main()
