"""Attention layouts: which query may see which key, as integers per token instead of a Q x K matrix.

One rule covers every layout of both families: each key has a code; a query sees the keys whose code is in its range
[low, high], and those whose code equals its `own`.

    bidirectional     one code per sample, another for padding                                     (LLaDA)
    block_causal      key code = block number, high = the query's block                            (SDAR)
    block_diffusion   [noisy | clean]: clean keys are ordered by (sample, block); a noisy query sees those up to the
                      block before its own, and its own noisy block by `own`                       (SDAR, training)

A layout of Q queries and K keys holds 3 Q + K integers per row; backends.py derives masks from them.

Shapes: B rows, Q queries, K keys, L tokens of a row, M tokens of a packed training row, b block length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NO_KEY = -1  # no key has this code
PADDING = -2  # the code of keys that no real query sees


@dataclass(eq=False)
class Layout:
    """low, high, own (B, Q) and code (B, K), int32.

    lengths (B,): set if every query sees exactly the keys [0, length). memo: masks that a backend derives once for all
    layers of a pass.
    """

    low: Tensor
    high: Tensor
    own: Tensor
    code: Tensor
    lengths: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Layout:
        lengths = None if self.lengths is None else self.lengths.to(device)
        low, high, own, code = (t.to(device) for t in (self.low, self.high, self.own, self.code))
        return Layout(low, high, own, code, lengths)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, Q, K)."""
        return self.low.shape[0], self.low.shape[1], self.code.shape[1]

    def visible(self, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """(B, 1, q, k) bool, True = may attend, for some of the queries and keys."""
        code = self.code[:, None, None, keys]
        low, high, own = (t[:, None, queries, None] for t in (self.low, self.high, self.own))
        return ((code >= low) & (code <= high)) | (code == own)


def block_causal(
    query_positions: Tensor, key_lengths: Tensor, num_keys: int, block_length: Tensor | None, one_block: bool = False
) -> Layout:
    """Decoding: query i sees key j if j // b <= i // b and j is below its row's key length.

    query_positions (B, Q), absolute; key_lengths (B,); block_length (B,), None for LLaDA, which sees all keys below the
    length. one_block: all queries of a row are in its last block, so they see every key below the length.
    """
    keys = torch.arange(num_keys, device=query_positions.device)
    code = keys if block_length is None else keys // block_length[:, None]
    code = torch.where(keys < key_lengths[:, None], code, PADDING).int()
    low = torch.zeros_like(query_positions, dtype=torch.int32)
    high = torch.full_like(low, num_keys) if block_length is None else (query_positions // block_length[:, None]).int()
    lengths = key_lengths if block_length is None or one_block else None
    return Layout(low, high, torch.full_like(low, NO_KEY), code, lengths)


def bidirectional(sample_ids: Tensor) -> Layout | None:
    """LLaDA: a token sees its whole sample. sample_ids (B, L), -1 is padding. None if every row is one sample."""
    if bool((sample_ids == 0).all()):
        return None
    # Padding sees padding, so that no softmax row is empty.
    code = torch.where(sample_ids < 0, PADDING, sample_ids).int()
    lengths = None
    if bool((sample_ids <= 0).all()) and bool((sample_ids[:, :-1] >= sample_ids[:, 1:]).all()):
        lengths = (sample_ids == 0).sum(1)
    return Layout(code, code, code, code, lengths)


@dataclass(frozen=True)
class PackedTokens:
    """[noisy | clean] training tokens of SDAR without those that affect no loss.

    A noisy block without a masked token has no loss and no other block sees it; a clean block is read only by later
    noisy blocks of its sample. Dropping both is exact: a prompt costs L tokens instead of 2 L, and a sample of one
    block half.

    source (B, M): the token's index in the row; noisy, valid (B, M) bool.
    """

    source: Tensor
    noisy: Tensor
    valid: Tensor
    layout: Layout

    def to(self, device: torch.device | str) -> PackedTokens:
        source, noisy, valid = (t.to(device) for t in (self.source, self.noisy, self.valid))
        return PackedTokens(source, noisy, valid, self.layout.to(device))


def block_diffusion(masked: Tensor, sample_ids: Tensor, positions: Tensor, block_length: int) -> PackedTokens:
    """masked (B, L) bool; sample_ids (B, L), -1 = padding; positions (B, L) counted from each sample's start."""
    num_rows, length = masked.shape
    device = masked.device
    # One number per (sample, block), increasing along the row. Padding has its own and is dropped below.
    stride = length // block_length + 2
    block = (sample_ids + 1) * stride + positions // block_length
    num_blocks = int(block.max()) + 1
    masked_blocks = torch.zeros(num_rows, num_blocks, device=device).scatter_add_(1, block, masked.float()) > 0
    keep_noisy = masked_blocks.gather(1, block) & (sample_ids >= 0)
    # The last masked block of each sample; only the clean blocks before it are needed.
    num_samples = int(sample_ids.max()) + 2
    last = torch.full((num_rows, num_samples), -1, device=device, dtype=torch.long)
    last.scatter_reduce_(1, sample_ids + 1, torch.where(keep_noisy, block, -1), "amax")
    keep_clean = (block < last.gather(1, sample_ids + 1)) & (sample_ids >= 0)

    keep = torch.cat([keep_noisy, keep_clean], dim=1)  # (B, 2L)
    width = max(1, int(keep.sum(1).max()))
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)[:, :width]  # kept tokens first, in order
    valid = keep.gather(1, order)
    noisy = order < length
    source = order % length
    block = block.gather(1, source)
    first = (block // stride) * stride  # the sample's first block
    # Codes of noisy keys follow those of all clean keys; padding is visible to padding only.
    noisy_code = num_blocks + block
    layout = Layout(
        low=torch.where(valid, first, 0).int(),
        high=torch.where(valid, block - noisy.long(), NO_KEY).int(),
        own=torch.where(valid, torch.where(noisy, noisy_code, NO_KEY), PADDING).int(),
        code=torch.where(valid, torch.where(noisy, noisy_code, block), PADDING).int(),
    )
    return PackedTokens(source, noisy, valid, layout)
