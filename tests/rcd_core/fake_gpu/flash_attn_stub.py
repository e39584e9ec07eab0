"""flash-attn's functions for the fake GPU: its signatures, and what its kernels require."""

from __future__ import annotations

import types
from typing import Any
from unittest import mock

import torch


def flash_attn_stub() -> Any:
    """A module with the signatures of flash-attn 2.8, which checks what its kernels require."""

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
        deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
    ) -> Any:  # fmt: skip
        _check_flash(q, k, v)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and len(cu_seqlens_q) == len(cu_seqlens_k)
        if block_table is not None:
            assert block_table.dtype == torch.int32 and block_table.stride(-1) == 1
            assert k.dim() == 4 and k.shape[1] % 256 == 0, "pages of a multiple of 256 positions"
            assert len(block_table) == len(cu_seqlens_q) - 1
        return torch.empty_like(q)

    def flash_attn_func(
        q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
        deterministic: bool = False, return_attn_probs: bool = False,
    ) -> Any:  # fmt: skip
        _check_flash(q, k, v)
        return torch.empty_like(q)

    functions = {f.__name__: f for f in (flash_attn_varlen_func, flash_attn_func)}
    module = types.ModuleType("flash_attn")
    module.__dict__.update(functions)
    module.__spec__ = mock.MagicMock()
    return module


def _check_flash(*tensors: torch.Tensor) -> None:
    assert {t.dtype for t in tensors} in ({torch.bfloat16}, {torch.float16}), [t.dtype for t in tensors]
    assert all(t.device.type == "cuda" and t.stride(-1) == 1 for t in tensors)
