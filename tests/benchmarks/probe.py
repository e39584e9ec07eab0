"""The header that every benchmark prints: hardware, command, and how idle the machine is."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch


def hardware() -> str:
    """CPU model, cores and memory, and the GPU if there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {gib:.0f} GiB{gpu}, torch {torch.__version__}"


def idle_probe(seconds: float = 1.0) -> dict[str, float]:
    """Repeats a 512 x 512 matrix product on one thread; returns median and maximum milliseconds. On an idle machine
    both are close. A maximum of several medians means that something else was running."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a = torch.ones(512, 512)
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        times.append(1e3 * (time.perf_counter() - start))
    torch.set_num_threads(threads)
    return {
        "median_ms": round(statistics.median(times), 3),
        "worst_ms": round(max(times), 3),
        "load": os.getloadavg()[0],
    }


def header() -> str:
    """Two lines for the top of a benchmark's output."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    command = " ".join(["python -m", module.name if module else sys.argv[0], *sys.argv[1:]])
    return f"hardware: {hardware()}\ncommand:  {command}\nidle probe: {idle_probe()}"
