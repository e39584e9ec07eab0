"""The device that a worker computes on, and its description for results."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def worker_device(num_threads: int | None) -> tuple[str, torch.dtype | None]:
    """Device and dtype for a worker's models: a GPU with bfloat16, or the CPU with the checkpoint's dtype (None).

    num_threads: CPU threads that torch may use where there is no GPU.
    """
    import torch

    if torch.cuda.is_available():
        return "cuda", torch.bfloat16
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return "cpu", None


def describe_device(device: str) -> dict[str, str | int]:
    """Name of the GPU or CPU, dtype of the passes, torch version; for a CPU also threads and cores."""
    import torch

    if device == "cuda":
        info: dict[str, str | int] = {"device": torch.cuda.get_device_name(), "dtype": "bfloat16"}
    else:
        info = {"device": cpu_model(), "dtype": "float32"}
        info |= {"threads": torch.get_num_threads(), "cores": os.cpu_count() or 0}
    return info | {"torch": torch.__version__}


def cpu_model() -> str:
    """The CPU's model name as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
