"""What holds for a whole process: whether checkpoints are verified, and whether results repeat bit for bit."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rcd_core.io import checksums

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # read by cuBLAS when it is first used


@dataclass(frozen=True)
class ProcessSettings:
    """verify_weights: compare the weights of a checkpoint with its stored digests (io/checksums.py).

    deterministic: the same work gives the same bits again, on one device of the same kind, with the same versions.
    PyTorch then takes deterministic kernels, and raises where an operation has none. Engines decode one request at a
    time and without captured passes, because the rounding of a row depends on the shape of its pass; they read
    PyTorch's switch, so `torch.use_deterministic_algorithms(True)` alone does the same in a script.
    """

    verify_weights: bool = True
    deterministic: bool = False

    def apply(self) -> None:
        """For the rest of the process. Call it before the first use of a GPU."""
        if not self.verify_weights:
            os.environ[checksums.SWITCH] = "0"
        if self.deterministic:
            os.environ.setdefault(_WORKSPACE, ":4096:8")
            import torch

            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
            # Nothing here reads memory that it has not written, and to fill it costs time on every allocation.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
