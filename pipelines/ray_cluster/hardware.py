"""What a measurement was made on, in words that can stand beside it."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> str:
    """The CPU's model name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def describe(device: str, dtype: str, threads: int) -> dict[str, str | int]:
    """One worker's: device (the GPU's name, or the CPU's), dtype of the passes, CPU threads it computes with (a GPU's
    worker has none to tell), torch."""
    import torch

    on_gpu = device == "cuda"
    found: dict[str, str | int] = {"device": torch.cuda.get_device_name() if on_gpu else processor(), "dtype": dtype}
    if not on_gpu:
        found |= {"threads": threads, "cores": os.cpu_count() or 0}
    return found | {"torch": torch.__version__}
