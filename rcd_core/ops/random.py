"""Random numbers as functions of a key, on the host and on the device. A draw depends on (seed, position, pass) and
nothing else, so it is the same in every batch and on every device.

Shapes: N positions, V numbers of each.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.noise import hash_key, splitmix64, uniform_of

_GAMMA, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # SplitMix64's, as int64


def position_keys(
    purpose: str, seeds: int | NDArray[np.int64], positions: NDArray[np.int64], passes: int | NDArray[np.int64] = 0
) -> NDArray[np.uint64]:
    """(N,) 64-bit keys of (purpose, seed, position, pass); seeds and passes are (N,) or one for all."""
    key = np.full(len(positions), hash_key(purpose), dtype=np.uint64)
    for part in (seeds, positions, passes):
        key = splitmix64(key ^ splitmix64(np.broadcast_to(np.asarray(part), key.shape).astype(np.uint64)))
    return key


def uniforms(keys: NDArray[np.uint64]) -> NDArray[np.float64]:
    """(N,) keys -> (N,) numbers in [0, 1)."""
    return uniform_of(keys)


def device_uniforms(keys: Tensor, count: int) -> Tensor:
    """(N,) int64 keys, on any device -> (N, count) fp64 numbers in [0, 1): the i-th depends on (key, i) only. Equal to
    noise.uniforms bit for bit."""
    counters = torch.arange(count, device=keys.device)
    bits = _splitmix64(counters ^ _splitmix64(keys)[:, None])
    return _shifted(bits, 11).double().mul_(2.0**-53)


def _splitmix64(x: Tensor) -> Tensor:
    """noise.splitmix64 on int64, whose additions and products wrap like those of uint64."""
    x = x + _GAMMA
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right, of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
