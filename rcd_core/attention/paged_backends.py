"""The choice of an attention backend for decoding, and how each plans a pass.

    sdpa, eager      plan on the host, from Rows
    varlen, flash    plan on the device, from integers that travel with the pass

"auto" takes, on CUDA in bf16 or fp16, varlen if its kernel runs here, and sdpa otherwise.

Shapes: R rows, C pages of a table.
"""

from __future__ import annotations

import importlib.util
import logging
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.attention.paged import Attend, EagerAttention, FlashAttention, Rows, SdpaAttention, VarlenAttention
from rcd_core.errors import UserError

log = logging.getLogger(__name__)
NAMES = ("auto", "sdpa", "eager", "varlen", "flash")
_HALF = (torch.bfloat16, torch.float16)


class PagedBackend(ABC):
    """on_device: a pass can be captured. needs_lanes: the pages of a request must be neighbours."""

    name = ""
    on_device = needs_lanes = False

    def __init__(self, heads: int, groups: int, page_size: int) -> None:
        self.heads, self.groups, self.page_size = heads, groups, page_size

    def integers(self, rows: Rows) -> NDArray[np.int64]:
        """What `plan` needs on the device."""
        return np.zeros(0, dtype=np.int64)

    @abstractmethod
    def plan(
        self, integers: Tensor, rows: Rows, num_rows: int, max_queries: int, max_keys: int, like: Tensor
    ) -> Attend:
        """The attention of one pass. integers: of `integers`. max_queries, max_keys: bounds over the rows. like: any
        tensor of the pass's device and dtype."""


class SdpaBackend(PagedBackend):
    name = "sdpa"

    def plan(
        self, integers: Tensor, rows: Rows, num_rows: int, max_queries: int, max_keys: int, like: Tensor
    ) -> Attend:
        return SdpaAttention(rows, self.page_size, self.heads, self.groups, like)


class EagerBackend(PagedBackend):
    name = "eager"

    def plan(
        self, integers: Tensor, rows: Rows, num_rows: int, max_queries: int, max_keys: int, like: Tensor
    ) -> Attend:
        return EagerAttention(rows, self.page_size)


class VarlenBackend(PagedBackend):
    """num_splits 1: rows do not depend on their batch, bit for bit."""

    name, on_device = "varlen", True

    def __init__(self, *sizes: int, follows_tables: bool, num_splits: int | None = None) -> None:
        super().__init__(*sizes)
        self.needs_lanes, self.num_splits = not follows_tables, num_splits

    def integers(self, rows: Rows) -> NDArray[np.int64]:
        if self.needs_lanes:
            keys = np.append(rows.tables[rows.slot, 0] * self.page_size, 0)
        else:
            keys = rows.tables[rows.slot].ravel()
        return np.concatenate([rows.starts, rows.num_keys, keys])

    def plan(
        self, integers: Tensor, rows: Rows, num_rows: int, max_queries: int, max_keys: int, like: Tensor
    ) -> Attend:
        integers = integers.int()
        starts, num_keys, keys = (
            integers[: num_rows + 1],
            integers[num_rows + 1 :][:num_rows],
            integers[2 * num_rows + 1 :],
        )
        columns = rows.tables.shape[1]
        return VarlenAttention(
            starts=starts,
            num_keys=num_keys,
            tables=None if self.needs_lanes else keys[: num_rows * columns].view(num_rows, columns),
            first_keys=keys[: num_rows + 1] if self.needs_lanes else None,
            page_size=self.page_size,
            max_queries=max_queries,
            max_keys=max_keys,
            num_splits=self.num_splits,
        )


class FlashBackend(PagedBackend):
    name, on_device = "flash", True

    def integers(self, rows: Rows) -> NDArray[np.int64]:
        ends = np.append(0, np.cumsum(rows.num_keys))
        return np.concatenate([rows.starts, ends, rows.tables[rows.slot].ravel()])

    def plan(
        self, integers: Tensor, rows: Rows, num_rows: int, max_queries: int, max_keys: int, like: Tensor
    ) -> Attend:
        integers = integers.int()
        starts, ends = integers[: num_rows + 1], integers[num_rows + 1 :][: num_rows + 1]
        columns = rows.tables.shape[1]
        tables = integers[2 * num_rows + 2 :][: num_rows * columns].view(num_rows, columns)
        return FlashAttention(starts, ends, tables, self.page_size, max_queries, max_keys)


def paged_backend(name: str, config: Any, dtype: torch.dtype, device: torch.device, page_size: int) -> PagedBackend:
    """The backend of this name for a model's config. Raises UserError if it is unknown or cannot run here.

    Where deterministic algorithms are asked for, a row's attention does not depend on its batch, bit for bit.
    """
    if name not in NAMES:
        raise UserError(f"attention is {name!r}, which does not decode; allowed: {', '.join(NAMES)}")
    sizes = config.num_attention_heads, config.num_key_value_heads, page_size
    kernels = device.type == "cuda" and dtype in _HALF
    if name in ("varlen", "flash") and not kernels:
        raise UserError(
            f"attention is {name!r} but the model is {dtype} on {device}; its kernels need CUDA and bf16 or fp16, "
            "use 'sdpa'"
        )
    if name == "flash":
        if importlib.util.find_spec("flash_attn") is None:
            raise UserError(
                "attention is 'flash' but the package flash-attn is not installed: pip install 'rcd-ray[flash]'"
            )
        return FlashBackend(*sizes)
    if kernels and name in ("auto", "varlen"):
        num_splits = 1 if torch.are_deterministic_algorithms_enabled() else None
        for follows_tables in (True, False):
            backend = VarlenBackend(*sizes, follows_tables=follows_tables, num_splits=num_splits)
            if (reason := _refusal(backend, config.head_dim, dtype, device)) is None:
                log.info("decoding attention: varlen, %s", "page tables" if follows_tables else "neighbouring pages")
                return backend
        if name == "varlen":
            raise UserError(f"attention is 'varlen' but its kernel does not run here ({reason}); use 'sdpa'")
        log.warning("decoding attention: sdpa, because the varlen kernel does not run here (%s)", reason)
    return EagerBackend(*sizes) if name == "eager" else SdpaBackend(*sizes)


def _refusal(backend: VarlenBackend, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel does not run: a row of one token over one page is tried."""
    rows = Rows(np.array([0, 1]), np.array([1]), np.array([0]), np.array([[1]]))
    like = torch.zeros(2 * backend.page_size, backend.groups, width, dtype=dtype, device=device)
    try:
        integers = torch.from_numpy(backend.integers(rows)).to(device)
        attend = backend.plan(integers, rows, 1, 1, backend.page_size, like)
        attend(like.new_zeros(1, backend.heads, width), like, like, 1.0)
        return None
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
