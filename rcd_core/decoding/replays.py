"""Passes captured once and replayed: on a GPU launching a pass's hundreds of kernels can cost more than running them.

A pass is a function of one array of integers and of what lies at fixed places on the device (weights, cache, residual
state). Capturing needs it to be free of host synchronisation and of shapes that depend on values; on a CPU it is simply
called, which is how both are tested without a GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_CAPTURES = 64  # of different keys; the longest unused goes

Pass = Callable[[Tensor], Tensor]


class Replays:
    """Captured passes by key: whatever the function does must be decided by the key and the integers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._captured: OrderedDict[Hashable, tuple[Any, Tensor, Tensor]] = OrderedDict()
        self._pool: Any = None

    def clear(self) -> None:
        """Something that captured passes refer to lies elsewhere now."""
        self._captured.clear()

    def __call__(self, key: Hashable, numbers: NDArray[np.int64], rehearsal: NDArray[np.int64], run: Pass) -> Tensor:
        """run(numbers on the device). rehearsal: integers of the same pass that change no residual, for warming up.
        The result is overwritten by the next call with this key."""
        if self.device.type != "cuda":
            return run(torch.from_numpy(numbers).to(self.device))
        if key not in self._captured:
            self._captured[key] = self._capture(rehearsal, run)
            if len(self._captured) > MAX_CAPTURES:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        graph, buffer, result = self._captured[key]
        buffer.copy_(torch.from_numpy(numbers))
        graph.replay()
        return result

    def _capture(self, rehearsal: NDArray[np.int64], run: Pass) -> tuple[Any, Tensor, Tensor]:
        buffer = torch.from_numpy(rehearsal).to(self.device)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # compiles kernels and lets libraries choose theirs
            for _ in range(2):
                run(buffer)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run(buffer)
        self._pool = graph.pool()
        return graph, buffer, result
