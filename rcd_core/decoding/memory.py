"""Plans an engine's memory before it is made: cache, residual state, transients of a pass, captured graphs, and what a
reference on the same device takes.

Shapes: V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rcd_core.attention.paged_backends import PagedBackend, paged_backend
from rcd_core.decoding.cuda_graphs import MAX_GRAPHS
from rcd_core.decoding.model_runner import MAX_PASS_TOKENS
from rcd_core.decoding.pages import bytes_per_position, page_size_of
from rcd_core.decoding.reference import LocalReference
from rcd_core.errors import UserError
from rcd_core.families.base import DiffusionModel
from rcd_core.families.experts import Experts
from rcd_core.ops.tiles import tile_rows

_TILES = 10  # tiles of logits alive at once when tokens are drawn (sorting, running sums in fp64); 4 when greedy
_SHARE = {"cuda": 0.9, "cpu": 0.5}  # of the free memory
_GRAPH_BYTES = 8 << 20  # of the driver, for each captured graph: an assumption, no GPU has run this


@dataclass(frozen=True)
class EngineMemory:
    """Bytes. cache: keys and values of all pages. state: residuals. transient: the peak of a pass beyond both. graphs:
    captured passes, whose pool PyTorch keeps apart."""

    cache: int
    state: int
    transient: int
    graphs: int = 0

    @property
    def total(self) -> int:
        return self.cache + self.state + self.transient + self.graphs


@dataclass(frozen=True)
class EnginePlan:
    """Engine's arguments. num_pages None: neighbouring pages for max_batch requests of max_length."""

    max_batch: int
    num_pages: int | None = None


def engine_memory(
    model: DiffusionModel,
    max_batch: int,
    max_length: int,
    block_length: int,
    num_pages: int | None = None,
    backend: PagedBackend | None = None,
) -> EngineMemory:
    """Memory of an engine for max_batch requests of up to max_length positions in blocks of up to block_length tokens.

    num_pages: as of Engine. backend: of its attention; None: one that is planned on the host.
    """
    c, item = model.config, model.dtype.itemsize
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    page = page_size_of(model.device)
    pages = max_batch * -(-max_length // page) if num_pages is None else num_pages
    cache = (pages + 1) * page * bytes_per_position(model)
    span = max_length if model.loophole is not None and model.whole_canvas else block_length
    state = (max_batch * span + 2) * (c.hidden_size * item + 4)
    tokens = max(min(MAX_PASS_TOKENS, max_batch * max_length), max_length)
    # One layer's activations with norms in fp32, and residuals in and out.
    experts = Experts.of(c)
    mlp = 3 * c.intermediate_size
    if experts is not None:  # each token once for each of its experts
        mlp = max(mlp, 3 * experts.active_columns + 2 * experts.chosen * c.hidden_size)
    layer = tokens * (item * (6 * c.hidden_size + mlp + 4 * heads) + 8 * c.hidden_size)
    residual = 3 * max_batch * block_length * c.hidden_size * max(item, 4)
    rows = min(tile_rows(model.vocab_size, model.device), max_batch * block_length)
    head = _TILES * 4 * rows * model.vocab_size
    if backend is not None and backend.on_device:  # reads the pages where they are
        transient = max(layer, residual + head)
        return EngineMemory(cache, state, transient, transient + MAX_GRAPHS * _GRAPH_BYTES)
    # The mask of a pass, and one layer's keys and values if the requests of a pass are not neighbours.
    mask = min(max_batch, -(-tokens // block_length)) * 2 * block_length * max_length * (2 * item + 4)
    gathered = cache // c.num_hidden_layers
    return EngineMemory(cache, state, max(layer + mask + gathered, residual + head))


def fit(
    model: DiffusionModel,
    max_length: int,
    block_length: int,
    max_batch: int,
    free: int | None = None,
    part: float = 1.0,
    reference: LocalReference | None = None,
    backend: PagedBackend | None = None,
    lanes: bool = False,
) -> EnginePlan:
    """The largest engine that fits, of at most max_batch requests at once.

    free: bytes, by default a share of the device's free memory. part: share of the device, if other processes will use
    the rest. reference: one on the same device, whose passes alternate with those of the engine. backend: of decoding,
    by default the model's. With one that follows page tables, requests need no room for their longest length: pages
    fill what is left, up to that, unless lanes is set: then each has such room, as a LocalReference's contexts have.
    Raises UserError if not even one request fits.
    """
    if backend is None:
        page = page_size_of(model.device)
        backend = paged_backend(model.attention, model.config, model.dtype, model.device, page)
    if free is None:
        available = available_bytes(model.device, part)
        if available is None:
            return EnginePlan(max_batch)
        free = int(available * _SHARE.get(model.device.type, 0.5))
    paged = backend.on_device and not backend.needs_lanes and not lanes
    each = -(-max_length // page_size_of(model.device))  # pages of a request
    page_bytes = page_size_of(model.device) * bytes_per_position(model)
    for count in range(max_batch, 0, -1):
        own = engine_memory(model, count, max_length, block_length, each if paged else None, backend)
        needed = own.total
        if reference is not None:
            other = reference.model
            states = count * max_length * other.config.hidden_size * other.dtype.itemsize
            transient = engine_memory(other, count, max_length, block_length).transient + states
            needed += reference.missing_bytes(count, max_length) + max(0, transient - own.transient)
        if needed <= free:
            return EnginePlan(count, min(count * each, each + (free - needed) // page_bytes) if paged else None)
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
