"""Policies: which masked tokens a pass commits, as in the generate.py of SDAR, LLaDA and Fast-dLLM.

A policy sees all live blocks of a step and returns (R, b) bool: a subset of `masked`, with at least one position
of each block that has a mask left and a quota, so decoding always ends. Of `independent`, the last planned pass does.

Shapes: R live blocks, b block columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rcd_core.decode_settings import ResolvedSettings

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BlockView:
    """masked, confidence, entropy (nats), rank (largest first) and random_score (uniform numbers) are (R, b); quota
    (commits planned for this pass, 0: it may commit nothing), share (of the masks, planned for this pass), threshold,
    bound (nats) and inclusive are (R,)."""

    masked: Bools
    confidence: Floats
    entropy: Floats
    rank: Floats
    random_score: Floats
    quota: NDArray[np.int64]
    share: Floats
    threshold: Floats
    bound: Floats
    inclusive: Bools  # commit at confidence >= threshold (Fast-dLLM) instead of > (SDAR)


def _lowest(scores: Floats, masked: Bools, count: NDArray[np.int64]) -> Bools:
    """The `count` (R,) masked columns with the lowest scores of each block; ties go to the left."""
    num_rows, num_columns = masked.shape
    scores, rows, chosen = np.where(masked, scores, np.inf), np.arange(num_rows), np.zeros_like(masked)
    if count.max(initial=0) <= 1:
        chosen[rows, scores.argmin(1)] = count > 0
    else:
        order = scores.argsort(axis=1, kind="stable")
        chosen[rows[:, None], order] = np.arange(num_columns) < count[:, None]
    return chosen & masked


def sequential(view: BlockView) -> Bools:
    """The leftmost `quota` masked columns."""
    return view.masked & (np.cumsum(view.masked, axis=1) <= view.quota[:, None])


def low_confidence_static(view: BlockView) -> Bools:
    """The `quota` masked columns of highest rank, for example the most confident."""
    return _lowest(-view.rank, view.masked, view.quota)


def low_confidence_dynamic(view: BlockView) -> Bools:
    """All masked columns above the threshold if they are at least `quota`, else the `quota` of highest rank."""
    threshold = view.threshold[:, None]
    above: Bools = (view.confidence > threshold) | (view.confidence == threshold) & view.inclusive[:, None]
    above &= view.masked
    enough = above.sum(1) >= view.quota
    if enough.all():
        return above
    return np.where(enough[:, None], above, low_confidence_static(view))


def entropy_bounded(view: BlockView) -> Bools:
    """The most certain masked columns whose entropies sum to less than the bound (JetEngine's rule)."""
    sums = np.cumsum(np.sort(np.where(view.masked, view.entropy, np.inf), axis=1), axis=1)
    count = (sums < view.bound[:, None]).sum(1)
    return _lowest(view.entropy, view.masked, np.maximum(count, np.minimum(view.quota, 1)))


def random(view: BlockView) -> Bools:
    """`quota` random masked columns: LLaDA's remasking "random"."""
    return _lowest(view.random_score, view.masked, view.quota)


def independent(view: BlockView) -> Bools:
    """Each masked column with the probability `share`: Dream's "origin". A pass may commit nothing."""
    return view.masked & (view.random_score < view.share[:, None])


POLICIES: dict[str, Callable[[BlockView], Bools]] = {
    "sequential": sequential,
    "low_confidence_static": low_confidence_static,
    "low_confidence_dynamic": low_confidence_dynamic,
    "entropy_bounded": entropy_bounded,
    "random": random,
    "independent": independent,
}


def planned_commits(s: ResolvedSettings, masked: int | None, first_alone: bool) -> list[int]:
    """Commits of each pass of a block; further passes plan as many as the last one. At least one, so that decoding
    ends, but for the schedule "time". SDAR divides the block length by the steps. LLaDA divides the masks at the
    block's start, and Fast-dLLM plans one commit under a threshold. first_alone: the first pass takes one."""
    if masked is None:
        return even_commits(s.block_length, s.denoising_steps)
    if s.policy == "low_confidence_dynamic":
        return [1]
    if s.schedule == "time":
        return timed_commits(masked, s.denoising_steps, first_alone)
    plan = (linear_commits if s.schedule == "linear" else even_commits)(masked, s.denoising_steps)
    return [1, *plan] if first_alone else plan


@lru_cache(1024)
def even_commits(masked: int, steps: int) -> list[int]:
    """As equal as possible, the larger ones first, and at least 1."""
    each, extra = divmod(masked, steps)
    return [each + 1] * extra + [max(1, each)]


def timed_commits(masked: int, steps: int, first_alone: bool = False) -> list[int]:
    """Dream's schedule: of the masks that are left, the share 1 - s/t, rounded down; the last pass takes all. Times and
    product in fp32, as in the authors' code. first_alone: the first pass takes one."""
    times, plan = _times(steps), list[int]()
    for step in range(steps):
        share = np.float32(1.0) - times[step + 1] / times[step]
        count = masked if step + 1 >= steps else int(np.float32(masked) * share)
        plan.append(1 if first_alone and not step else count)
        masked -= plan[-1]
    return plan


def linear_commits(masked: int, steps: int) -> list[int]:
    """dLLM's linear schedule: in each pass the share 1 - s/t of the masks that are left, rounded to even; passes that
    would commit nothing are left out. Shares in fp32, from alpha = 1 - t, as in the authors' code."""
    one, plan = np.float32(1.0), list[int]()
    shares = one - (one - np.arange(steps, -1, -1, dtype=np.float32) / np.float32(steps))
    for t, s in zip(shares, shares[1:], strict=False):
        plan.append(round(masked * float(one - s / t)))
        masked -= plan[-1]
    return [count for count in plan if count]


def planned_share(step: int, steps: int, by_time: bool) -> float:
    """Of the masks that are left, what pass `step` of `steps` commits if all passes commit as many, or by Dream's times
    (in fp32, as in the authors' code). The last pass takes all."""
    if step + 1 >= steps:
        return 1.0
    return float(np.float32(1.0) - _times(steps)[step + 1] / _times(steps)[step]) if by_time else 1.0 / (steps - step)


@lru_cache(64)
def _times(steps: int) -> NDArray[np.float32]:
    """torch.linspace(1, .001, steps + 1), but for its last bit, which depends on the CPU."""
    first, last = np.float32(1.0), np.float32(1e-3)
    width, at = (last - first) / np.float32(steps), np.arange(steps + 1, dtype=np.float32)
    upper = at < (steps + 1) // 2
    times: NDArray[np.float32] = np.where(upper, first + width * at, last - width * (np.float32(steps) - at))
    return times
