"""Which masked tokens a pass commits (semantics.md 1.6, 3). A policy sees a block of every request at once.

Arrays: R requests, b block columns. masked (R, b) bool; confidence (R, b); entropy (R, b) nats; lot (R, b) uniform
random numbers; quota (R,) planned commits of this pass; threshold (R,); bound (R,) nats. Each returns (R, b) bool, a
subset of masked, at least one per request that has a mask left: so decoding always ends. A policy that revises
committed tokens would return more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BlockView:
    masked: Bools
    confidence: Floats
    entropy: Floats
    lot: Floats
    quota: NDArray[np.int64]
    threshold: Floats
    bound: Floats
    inclusive: bool  # commit at confidence >= threshold (Fast-dLLM) instead of > (SDAR)


def _lowest(scores: Floats, masked: Bools, count: NDArray[np.int64]) -> Bools:
    """The `count` masked columns of lowest score per request; ties go to the left."""
    num_rows, num_columns = masked.shape
    order = np.argsort(np.where(masked, scores, np.inf), axis=1, kind="stable")
    chosen = np.zeros_like(masked)
    chosen[np.arange(num_rows)[:, None], order] = np.arange(num_columns) < np.maximum(count, 1)[:, None]
    return chosen & masked


def sequential(view: BlockView) -> Bools:
    """The leftmost `quota` masked columns."""
    return view.masked & (np.cumsum(view.masked, axis=1) <= np.maximum(view.quota, 1)[:, None])


def low_confidence_static(view: BlockView) -> Bools:
    """The `quota` most confident."""
    return _lowest(-view.confidence, view.masked, view.quota)


def low_confidence_dynamic(view: BlockView) -> Bools:
    """All above the threshold if these are at least `quota`; else the `quota` most confident."""
    threshold = view.threshold[:, None]
    above = view.confidence >= threshold if view.inclusive else view.confidence > threshold
    above &= view.masked
    enough = above.sum(1) >= np.maximum(view.quota, 1)
    return np.where(enough[:, None], above, low_confidence_static(view))


def entropy_bounded(view: BlockView) -> Bools:
    """The most certain ones: as many as have a running sum of entropies below the bound (JetEngine's rule)."""
    sums = np.cumsum(np.sort(np.where(view.masked, view.entropy, np.inf), axis=1), axis=1)
    return _lowest(view.entropy, view.masked, (sums < view.bound[:, None]).sum(1))


def random(view: BlockView) -> Bools:
    """`quota` masked columns by lot: LLaDA's remasking "random" (semantics.md 2.2)."""
    return _lowest(view.lot, view.masked, view.quota)


POLICIES: dict[str, Callable[[BlockView], Bools]] = {
    "sequential": sequential,
    "low_confidence_static": low_confidence_static,
    "low_confidence_dynamic": low_confidence_dynamic,
    "entropy_bounded": entropy_bounded,
    "random": random,
}
