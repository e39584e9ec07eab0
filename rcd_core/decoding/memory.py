"""Estimates KV cache, residual state and peak transient memory, so that the largest batch can be chosen up front.

Shapes: S slots, T positions of a slot, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rcd_core.decoding.model_runner import MAX_PASS_TOKENS
from rcd_core.decoding.pages import bytes_per_position, page_size_of
from rcd_core.decoding.reference import LocalReference
from rcd_core.decoding.sampler import TILE_BYTES
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel

_TILES = 10  # tiles of logits alive at once when tokens are drawn (sorting, running sums in fp64); 4 when greedy
_SHARE = {"cuda": 0.9, "cpu": 0.5}  # of the free memory


@dataclass(frozen=True)
class EngineMemory:
    """Bytes. cache: keys and values of all slots. state: their residuals. transient: the peak of a pass beyond both."""

    cache: int
    state: int
    transient: int

    @property
    def total(self) -> int:
        return self.cache + self.state + self.transient


def engine_memory(model: DiffusionModel, max_batch: int, max_length: int, block_length: int) -> EngineMemory:
    """Memory of an engine with max_batch slots of max_length positions, for blocks of up to block_length tokens."""
    c, item = model.config, model.dtype.itemsize
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    page = page_size_of(model.device)
    cache = (max_batch * -(-max_length // page) + 1) * page * bytes_per_position(model)
    state = (max_batch * block_length + 2) * (c.hidden_size * item + 4)
    tokens = max(min(MAX_PASS_TOKENS, max_batch * max_length), max_length)
    # One layer's activations with norms in fp32, the mask of a pass, the gathered keys and values of one layer if the
    # slots are scattered, and residuals in and out.
    layer = tokens * (item * (6 * c.hidden_size + 3 * c.intermediate_size + 4 * heads) + 8 * c.hidden_size)
    mask = min(max_batch, -(-tokens // block_length)) * 2 * block_length * max_length * (2 * item + 4)
    scattered = cache // c.num_hidden_layers
    residual = 3 * max_batch * block_length * c.hidden_size * max(item, 4)
    head = _TILES * min(max(TILE_BYTES, 4 * model.vocab_size), 4 * max_batch * block_length * model.vocab_size)
    return EngineMemory(cache, state, max(layer + mask + scattered, residual + head))


def fit_batch(
    model: DiffusionModel,
    max_length: int,
    block_length: int,
    max_batch: int,
    free: int | None = None,
    part: float = 1.0,
    reference: LocalReference | None = None,
) -> int:
    """How many requests fit at once, at most max_batch. free: bytes, by default a share of the device's free memory.
    part: share of the device, if other processes will use the rest. reference: one on the same device, whose passes
    alternate with those of the engine. Raises UserError if not even one fits."""
    if free is None:
        available = available_bytes(model.device, part)
        if available is None:
            return max_batch
        free = int(available * _SHARE.get(model.device.type, 0.5))
    for count in range(max_batch, 0, -1):
        own = engine_memory(model, count, max_length, block_length)
        needed = own.total
        if reference is not None:
            other = reference.model
            states = count * max_length * other.config.hidden_size * other.dtype.itemsize
            transient = engine_memory(other, count, max_length, block_length).transient + states
            needed += reference.missing_bytes(count, max_length) + max(0, transient - own.transient)
        if needed <= free:
            return count
    raise UserError(
        f"a request of {max_length} positions needs {needed / 2**30:.2f} GiB in addition to the weights and "
        f"{free / 2**30:.2f} GiB are available; lower max_new_tokens or shorten the prompt"
    )


def available_bytes(device: torch.device, part: float = 1.0) -> int | None:
    """Free memory of a device in bytes; None if unknown. part: share of a GPU that belongs to this process."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        cached = torch.cuda.memory_reserved(device) - allocated  # freed, and kept by PyTorch for the next tensors
        return min(free + cached, int(part * total) - allocated)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
