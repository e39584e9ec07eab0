"""The device that a process computes on, and its description for results."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from rcd_core.errors import UserError

if TYPE_CHECKING:
    import torch


def device_of(gpus: float | None, threads: int | None = None) -> tuple[str, torch.dtype | None]:
    """Device and dtype of a process's models: a GPU with bfloat16, or the CPU with the checkpoint's dtype (None).

    gpus: what the process has asked Ray for, as Ray shows GPUs also to processes that asked for none. None: a process
    outside of Ray, which uses a GPU if there is one. threads: CPU threads that torch may use on the CPU.
    Raises UserError if a GPU was asked for and torch cannot use one.
    """
    import torch

    if gpus != 0 and torch.cuda.is_available():
        return "cuda", torch.bfloat16
    if gpus:
        raise UserError(
            f"{gpus:g} GPUs were asked for (resources.gpus_per_worker, in Serve configs num_gpus), but torch "
            f"{torch.__version__} on {platform.node()} can use none; install a CUDA build of torch and a driver "
            "there, or ask for 0"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    return "cpu", None


def gpu_share(gpus: float) -> float:
    """The share of its GPU that belongs to a process."""
    return min(1.0, gpus) or 1.0


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
