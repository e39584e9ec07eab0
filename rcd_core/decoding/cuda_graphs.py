"""CUDA-graph cache. Decode passes are launch-bound, so each fixed shape is captured once and replayed.

A pass is a function of one integer array and of tensors at fixed addresses (weights, cache, residual state). Capture
forbids host synchronisation and shapes that depend on values. On a CPU the function is called directly, so that the
fixed-shape path can be tested without a GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_GRAPHS = 64  # then the least recently used is dropped

DevicePass = Callable[[Tensor], Any]


class GraphCache:
    """Captured passes by key. Key and integers must determine everything that the function does."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graphs: OrderedDict[Hashable, tuple[Any, Tensor, Any]] = OrderedDict()
        self._pool: Any = None

    def clear(self) -> None:
        """Drop all graphs, because a tensor that they refer to has moved."""
        self._graphs.clear()

    def __call__(
        self, key: Hashable, inputs: NDArray[np.int64], warmup_inputs: NDArray[np.int64], run: DevicePass
    ) -> Any:
        """run(inputs on the device). warmup_inputs: the same pass writing no residual, for warm-up and capture.
        The next call with this key overwrites the result."""
        if self.device.type != "cuda":
            return run(torch.from_numpy(inputs).to(self.device))
        if key not in self._graphs:
            self._graphs[key] = self._capture(warmup_inputs, run)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph, buffer, result = self._graphs[key]
        buffer.copy_(torch.from_numpy(inputs))
        graph.replay()
        return result

    def _capture(self, warmup_inputs: NDArray[np.int64], run: DevicePass) -> tuple[Any, Tensor, Any]:
        buffer = torch.from_numpy(warmup_inputs).to(self.device)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # kernels are compiled and libraries choose theirs before the capture
            for _ in range(2):
                run(buffer)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run(buffer)
        self._pool = graph.pool()
        return graph, buffer, result
