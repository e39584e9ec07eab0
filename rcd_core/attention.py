"""Attention layouts by index arithmetic, and the backend the transformer layers call.

A layout says which query may see which key. None is full attention (LLaDA without padding); a bool tensor
(B, 1, Q, K), True = may attend, is everything else. It is built from position and block numbers, never from a
(2L)^2 triangle that is cut up afterwards.

Shapes: B rows, H heads, Q queries, K keys, L tokens, M tokens of a packed training row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface


def sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """(B, H, Q, d) x (B, Hkv, K, d) -> (B, Q, H, d). Without a mask attention is full, never causal."""
    grouped = query.shape[1] != key.shape[1]
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2).contiguous(), None


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same in plain matrix products: the reference that other backends are checked against."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = torch.softmax(scores.float(), dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("rcd_sdpa", sdpa_attention)
AttentionInterface.register("rcd_eager", eager_attention)
BACKENDS = {"sdpa": "rcd_sdpa", "eager": "rcd_eager"}


def block_causal_mask(query_positions: Tensor, key_lengths: Tensor, num_keys: int, block_length: int | None) -> Tensor:
    """SDAR's decoding layout: query i may attend key j iff j // b <= i // b (semantics.md 1.4), and j < key length.

    query_positions (B, Q) absolute; key_lengths (B,); block_length None is LLaDA: every key below the length.
    Returns (B, 1, Q, num_keys).
    """
    keys = torch.arange(num_keys, device=query_positions.device)
    visible = (keys < key_lengths[:, None]).unsqueeze(1)  # (B, 1, K)
    if block_length is not None:
        visible = visible & (keys // block_length <= (query_positions // block_length).unsqueeze(-1))
    return visible.expand(-1, query_positions.shape[1], -1).unsqueeze(1)


@dataclass(frozen=True)
class BlockDiffusionLayout:
    """[noisy | clean] training tokens of SDAR (semantics.md 1.9), dead ones left out.

    A noisy block without a masked token carries no loss and is seen by nobody else; a clean block is only read by
    later noisy blocks of its sample. So it is exact to keep just the noisy blocks with a masked token, and the clean
    blocks before the last of these: a prompt costs L tokens, not 2L, and a sample of one block half.

    source (B, M): index of the token in the row; noisy, valid (B, M) bool; mask (B, 1, M, M).
    """

    source: Tensor
    noisy: Tensor
    valid: Tensor
    mask: Tensor


def block_diffusion_layout(
    masked: Tensor, sample_ids: Tensor, positions: Tensor, block_length: int
) -> BlockDiffusionLayout:
    """masked (B, L) bool; sample_ids (B, L), -1 = padding; positions (B, L) counted from each sample's start."""
    num_rows, length = masked.shape
    device = masked.device
    # One number per (sample, block), increasing along the row; padding gets its own, dropped below.
    stride = length // block_length + 2
    block = (sample_ids + 1) * stride + positions // block_length
    num_blocks = int(block.max()) + 1
    masked_blocks = torch.zeros(num_rows, num_blocks, device=device).scatter_add_(1, block, masked.float()) > 0
    keep_noisy = masked_blocks.gather(1, block) & (sample_ids >= 0)
    # Last masked block of each sample: clean blocks strictly before it are needed.
    num_samples = int(sample_ids.max()) + 2
    last = torch.full((num_rows, num_samples), -1, device=device, dtype=torch.long)
    last.scatter_reduce_(1, sample_ids + 1, torch.where(keep_noisy, block, -1), "amax")
    keep_clean = (block < last.gather(1, sample_ids + 1)) & (sample_ids >= 0)

    keep = torch.cat([keep_noisy, keep_clean], dim=1)  # (B, 2L)
    width = int(keep.sum(1).max())
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)[:, :width]  # kept ones first, in order
    valid = keep.gather(1, order)
    noisy = order < length
    source = order % length
    q_sample, q_block = sample_ids.gather(1, source), block.gather(1, source)
    same_sample = q_sample.unsqueeze(2) == q_sample.unsqueeze(1)
    q_noisy, k_noisy = noisy.unsqueeze(2), noisy.unsqueeze(1)
    q_blk, k_blk = q_block.unsqueeze(2), q_block.unsqueeze(1)
    own = (q_noisy == k_noisy) & (q_blk == k_blk)
    clean_prefix = ~k_noisy & torch.where(q_noisy, k_blk < q_blk, k_blk <= q_blk)
    mask = same_sample & (own | clean_prefix) & valid.unsqueeze(1)
    # A padding query sees itself, so that no softmax row is empty.
    mask = mask | (~valid.unsqueeze(2) & torch.eye(width, dtype=torch.bool, device=device))
    return BlockDiffusionLayout(source, noisy, valid, mask.unsqueeze(1))
