"""Forward process: which tokens of an example are masked, as a counter-based hash.

Noise is a pure function of (seed, draw, example id, position). There is no generator state, so a row does not depend on
its neighbours, its worker or the order of computation. Training from examples, the signal cache and validation use the
same function, so runs that start alike see the same tokens and masks.

Shapes: L tokens of an example; R examples end to end with T tokens in all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError

_MASK64 = (1 << 64) - 1
NUM_SEED_BITS = 31
FULLY_MASKED = 0.25  # of the groups end in a block as decoding adds it
_MAX_REDRAWS = 10  # as SDAR's training code: an empty mask is drawn again, then one token is forced


@dataclass(frozen=True, kw_only=True)
class NoiseSettings:
    """Each token is masked with probability p = (1 - eps) t + eps, t ~ U[0, 1) per example.

    draws: number of different masks per example; epoch e uses draw e mod draws. block_length: draw t for each block of
    that many tokens, counted from the example's start. None: one t per example, as SDAR trains.
    layout: "single", where a noisy block sees clean ones only, or one for targets that decode several live blocks.
    "multi_block" (MultiTF, block-causal models): groups of at most `group_blocks` blocks, whose p does not fall from
    block to block. They begin at the first labelled block. The last block of a group is fully masked with probability
    FULLY_MASKED. "d2f" (D2F, whole-canvas models): blocks from the first labelled token on, each of which sees those
    before it, noisy as they are; p does not fall, from a first one in [.2, .7) to at most .7. With probability
    FULLY_MASKED all blocks from one on are fully masked, as decoding begins them; the authors have no such blocks.
    complementary: an odd draw masks the labelled tokens that the draw before it leaves (Fast-dLLM v2's second view).
    """

    __pydantic_config__ = {"extra": "forbid"}

    seed: int = 0
    draws: int = 4
    eps: float = 1e-3
    block_length: int | None = None
    layout: Literal["single", "multi_block", "d2f"] = "single"
    group_blocks: int = 4
    complementary: bool = False

    def __post_init__(self) -> None:
        if self.group_blocks < 2:
            raise UserError(f"noise.group_blocks is {self.group_blocks}; it must be at least 2")
        if self.layout != "single" and self.block_length is None:
            raise UserError(f"noise.layout is {self.layout} but noise.block_length is null; give the length of blocks")
        if self.complementary and self.layout != "single":
            raise UserError(f"noise.complementary is true but noise.layout is {self.layout}; set one to its default")
        if self.complementary and self.draws % 2:
            raise UserError(f"noise.complementary is true but noise.draws is {self.draws}; give an even number")
        if self.draws < 1:
            raise UserError(f"noise.draws is {self.draws}; it must be at least 1")
        if not 0.0 <= self.eps < 1.0:
            raise UserError(f"noise.eps is {self.eps}; it must lie in [0, 1)")
        if self.block_length is not None and self.block_length < 1:
            raise UserError(f"noise.block_length is {self.block_length}; it must be at least 1, or null")


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 finaliser: a bijection on 64-bit integers with good avalanche (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash_key(*parts: int | str) -> int:
    """A 64-bit key of the parts, stable across machines and Python versions (unlike the built-in hash)."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def seed_of(*parts: int | str) -> int:
    """A seed of NUM_SEED_BITS bits, from the same parts as a key."""
    return hash_key(*parts) & ((1 << NUM_SEED_BITS) - 1)


def uniforms(key: int, count: int) -> NDArray[np.float64]:
    """(count,) numbers in [0, 1): the i-th depends on (key, i) only."""
    return uniform_of(np.arange(count, dtype=np.uint64) ^ splitmix64(np.array([key & _MASK64], dtype=np.uint64)))


def uniform_of(state: NDArray[np.uint64]) -> NDArray[np.float64]:
    """One number in [0, 1) of each 64-bit state."""
    return (splitmix64(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def count_set(flags: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """flags (T,), offsets (R + 1,) where lists begin -> (R,) flags set in each list."""
    cumulative = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
    return np.asarray(cumulative[offsets[1:]] - cumulative[offsets[:-1]])


def mask_example(
    maskable: NDArray[np.bool_], example_id: str, draw: int, settings: NoiseSettings
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Masks one example (Eq. 4: each token with probability p).

    maskable (L,): True where a token has a label. Returns masked (L,), at least one True, and the masking
    probabilities p (L,). UserError if no token is maskable.
    """
    masked, p, _ = _draw(maskable, example_id, draw, settings)
    return masked, p


def mask_examples(
    maskable: NDArray[np.bool_],
    offsets: NDArray[np.int64],
    example_ids: Sequence[str],
    draw: int,
    settings: NoiseSettings,
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """`mask_example` for many examples, vectorised and equal to the bit: maskable (T,), offsets (R + 1,) where examples
    begin -> masked (T,), p (T,). An example without a maskable token gets an empty mask.

    Calls per example would cost more than the reference's pass over a small row.
    """
    if settings.block_length is None:
        drawn = _drawn(draw, settings)
        keys = np.array([hash_key(settings.seed, drawn, name, 0) for name in example_ids], dtype=np.uint64)
        lengths = np.diff(offsets)
        streams = splitmix64(keys)
        levels = (1.0 - settings.eps) * uniform_of(streams) + settings.eps  # counter 0; the tokens' counters begin at 1
        counters = np.arange(1, len(maskable) + 1, dtype=np.int64) - np.repeat(offsets[:-1], lengths)
        p = np.repeat(levels, lengths)
        masked = (uniform_of(counters.astype(np.uint64) ^ np.repeat(streams, lengths)) < p) & maskable
        if drawn != draw:
            masked, p = maskable & ~masked, np.maximum(1.0 - p, settings.eps)
    else:
        masked, p = np.zeros_like(maskable), np.ones(len(maskable))
    # Noise levels per block, and redraws of an empty mask, are drawn example by example.
    empty = count_set(masked, offsets) == 0
    if settings.complementary:
        empty |= count_set(maskable & ~masked, offsets) == 0
    empty &= count_set(maskable, offsets) > 0
    for row in np.flatnonzero(empty).tolist():
        tokens = slice(offsets[row], offsets[row + 1])
        masked[tokens], p[tokens] = mask_example(maskable[tokens], example_ids[row], draw, settings)
    return masked, p


def nested_masks(
    maskable: NDArray[np.bool_], example_id: str, draw: int, settings: NoiseSettings, gaps: Sequence[float]
) -> list[NDArray[np.bool_]]:
    """(L,) masks of ever noisier versions of the same draw; each contains the one before and `mask_example`'s own.

    gaps: how much each adds to the masking probability.
    """
    masked, p, u = _draw(maskable, example_id, draw, settings)
    noisier = []
    for gap in gaps:
        p = np.minimum(1.0, p + gap)
        masked = masked | ((u < p) & maskable)
        noisier.append(masked)
    return noisier


def _draw(
    maskable: NDArray[np.bool_], example_id: str, draw: int, settings: NoiseSettings
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    """(masked (L,), p (L,), the random numbers (L,) that p was compared with)."""
    if not maskable.any():
        raise UserError(f"example {example_id!r} has no labelled token; remove it or fix its labels")
    drawn = _drawn(draw, settings)
    masked, p, u = _first_draw(maskable, example_id, drawn, settings)
    rest = maskable & ~masked
    if drawn == draw or not rest.any():
        return masked, p, u
    return rest, np.maximum(1.0 - p, settings.eps), 1.0 - u


def _drawn(draw: int, settings: NoiseSettings) -> int:
    """The draw whose random numbers this one uses."""
    return draw - draw % 2 if settings.complementary else draw


def _first_draw(
    maskable: NDArray[np.bool_], example_id: str, draw: int, settings: NoiseSettings
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    length = maskable.shape[0]
    for attempt in range(_MAX_REDRAWS):
        u = uniforms(hash_key(settings.seed, draw, example_id, attempt), length + 1)
        t = np.repeat(u[0], length)
        if settings.layout == "multi_block" and settings.block_length is not None:
            starts = group_starts(maskable, example_id, draw, settings)
            key = hash_key(settings.seed, draw, example_id, attempt, "blocks")
            t = chained(starts, uniforms(key, 3 * len(starts))).repeat(settings.block_length)[:length]
        elif settings.layout == "d2f":
            blocks = blocks_from_label(maskable, settings)
            key = hash_key(settings.seed, draw, example_id, attempt, "blocks")
            t = rising(uniforms(key, int(blocks.max()) + 2))[np.maximum(blocks - 1, 0)]
        elif settings.block_length is not None:
            key = hash_key(settings.seed, draw, example_id, attempt, "blocks")
            t = uniforms(key, -(-length // settings.block_length)).repeat(settings.block_length)[:length]
        p = (1.0 - settings.eps) * t + settings.eps
        masked = (u[1:] < p) & maskable
        if masked.any() and not (settings.complementary and maskable.sum() > 1 and (masked == maskable).all()):
            return masked, p, u[1:]
    candidates = np.flatnonzero(maskable)
    masked = np.zeros_like(maskable)
    masked[candidates[int(u[0] * len(candidates))]] = True
    return masked, p, u[1:]


def group_starts(maskable: NDArray[np.bool_], example_id: str, draw: int, settings: NoiseSettings) -> NDArray[np.int64]:
    """(number of blocks,): the first block of each block's group. maskable (L,). Blocks before the first maskable one
    are groups of their own. Sizes are drawn between 2 and `group_blocks`, that of the first group from 1 on."""
    assert settings.block_length is not None
    num_blocks = -(-len(maskable) // settings.block_length)
    starts = np.arange(num_blocks)
    start = int(maskable.argmax()) // settings.block_length
    draws = uniforms(hash_key(settings.seed, draw, example_id, "groups"), num_blocks)
    smallest = 1
    for u in draws:
        if start >= num_blocks:
            break
        size = smallest + int(u * (settings.group_blocks - smallest + 1))
        starts[start : start + size] = start
        start, smallest = start + size, 2
    return starts


def chained(starts: NDArray[np.int64], u: NDArray[np.float64]) -> NDArray[np.float64]:
    """(number of blocks,) levels t that do not fall within a group. u (3 x blocks): random numbers for the group's
    floor, for the step of each block, and for whether the group's last block is fully masked.

    The floor is uniform in [0, 1], each level uniform between the one before and 1 (`chain_uniform` of mbd-lms).
    """
    floors, steps, full = u.reshape(3, -1)
    t = np.empty(len(starts))
    for block, start in enumerate(starts):
        below = floors[block] if block == start else t[block - 1]
        t[block] = below + (1.0 - below) * steps[block]
    is_last = np.append(starts[1:] != starts[:-1], True)
    t[is_last & (full < FULLY_MASKED)] = 1.0
    return t


def blocks_from_label(maskable: NDArray[np.bool_], settings: NoiseSettings) -> NDArray[np.int64]:
    """(L,) each token's block in the layout "d2f": counted from 1 at the first maskable token, 0 before."""
    assert settings.block_length is not None
    behind = np.arange(len(maskable)) - int(maskable.argmax())
    return np.where(behind < 0, 0, behind // settings.block_length + 1)


def d2f_levels(first: NDArray[np.float64], increments: NDArray[np.float64]) -> NDArray[np.float64]:
    """Random numbers (...,) and (..., n - 1) -> (..., n) masking probabilities of D2F's `generate_monotonic_pmasks`."""
    p = first[..., None] / 2 + 0.2
    steps = increments * (0.7 - p) / max(1, increments.shape[-1])
    return np.concatenate([p, p + np.cumsum(steps, -1)], -1)


def rising(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n + 1,) random numbers -> (n,) levels of the layout "d2f" of n blocks."""
    levels = d2f_levels(u[0], u[1:-1])
    if u[-1] < FULLY_MASKED:
        levels[int(u[-1] / FULLY_MASKED * len(levels)) :] = 1.0
    return levels
