"""Attention layouts: which query may see which key, as integers per token instead of a Q x K matrix.

One rule covers every layout: each key has a code; a query sees the keys whose code is in its range [low, high], and
those whose code is in its range [own_low, own].

    bidirectional     one code per sample, another for padding                                     (LLaDA)
    causal_blocks     one code per (sample, block); low = the sample's first      (D2F, training of LLaDA)
    block_causal      key code = block number, high = the query's block                            (SDAR)
    block_diffusion   [noisy | clean]: clean keys are ordered by (sample, block); a noisy query sees those up to the
                      block before its own, and its own noisy block by `own`                       (SDAR, training)
                      in groups: clean blocks before its group, noisy ones of its group up to its own    (MultiTF)

A layout of Q queries and K keys holds 3 Q + K integers per row, 4 Q + K in groups; backends.py makes masks of them.

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
    """low, high, own (B, Q) and code (B, K), int32. own_low (B, Q): None where it equals own.

    lengths (B,): set if every query sees exactly the keys [0, length). memo: masks that a backend derives once for all
    layers of a pass.
    """

    low: Tensor
    high: Tensor
    own: Tensor
    code: Tensor
    lengths: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    own_low: Tensor | None = None

    def to(self, device: torch.device | str) -> Layout:
        lengths, own_low = (None if t is None else t.to(device) for t in (self.lengths, self.own_low))
        low, high, own, code = (t.to(device) for t in (self.low, self.high, self.own, self.code))
        return Layout(low, high, own, code, lengths, own_low=own_low)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, Q, K)."""
        return self.low.shape[0], self.low.shape[1], self.code.shape[1]

    def visible(self, queries: slice = slice(None), keys: slice = slice(None)) -> Tensor:
        """(B, 1, q, k) bool, True = may attend, for some of the queries and keys."""
        code = self.code[:, None, None, keys]
        low, high, own = (t[:, None, queries, None] for t in (self.low, self.high, self.own))
        of_own = code == own
        if self.own_low is not None:
            of_own = (code >= self.own_low[:, None, queries, None]) & (code <= own)
        return ((code >= low) & (code <= high)) | of_own


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


def causal_blocks(sample_ids: Tensor, blocks: Tensor) -> Layout:
    """D2F: a token sees its sample's blocks up to its own. sample_ids (B, L), -1 is padding; blocks (B, L), the number
    of each token's block in its sample."""
    start = (sample_ids + 1) * (int(blocks.max()) + 1)
    low = torch.where(sample_ids < 0, PADDING, start).int()
    code = torch.where(sample_ids < 0, PADDING, start + blocks).int()
    return Layout(low, code, code, code)


@dataclass(frozen=True)
class PackedTokens:
    """[noisy | clean] training tokens of SDAR without those that affect no loss.

    A noisy block without a masked token has no loss, and no other block sees it but later ones of its group. A clean
    block is read only by later noisy blocks of its sample. Dropping what is not read is exact: a prompt costs L tokens
    instead of 2 L, and a sample of one block half.

    source (B, M): the token's index in the row; noisy, valid (B, M) bool. before (B, M): where, among the M, the row is
    that predicts a noisy token in a shifted model: the noisy copy of the token before it; at the start of a block or
    group the clean copy, as in decoding; for a sample's first token its own.
    """

    source: Tensor
    noisy: Tensor
    valid: Tensor
    layout: Layout
    before: Tensor

    def to(self, device: torch.device | str) -> PackedTokens:
        source, noisy, valid, before = (t.to(device) for t in (self.source, self.noisy, self.valid, self.before))
        return PackedTokens(source, noisy, valid, self.layout.to(device), before)


def block_diffusion(
    masked: Tensor,
    sample_ids: Tensor,
    positions: Tensor,
    block_length: int,
    first_noisy: Tensor | None = None,
    num_clean: Tensor | None = None,
) -> PackedTokens:
    """masked (B, L) bool; sample_ids (B, L), -1 = padding; positions (B, L) counted from each sample's start.

    first_noisy (B, L): number, within its sample, of the first noisy block that a token's noisy copy sees, up to its
    own; None: its own. num_clean (B, L): the number of its sample's clean blocks that it sees; None: first_noisy.
    """
    num_rows, length = masked.shape
    device = masked.device
    # One number per (sample, block), increasing along the row. Padding has its own and is dropped below.
    stride = length // block_length + 2
    block = (sample_ids + 1) * stride + positions // block_length
    start = (sample_ids + 1) * stride  # the sample's first block
    num_blocks = int(block.max()) + 1
    earliest = block if first_noisy is None else start + first_noisy
    clean_end = earliest if num_clean is None else start + num_clean  # of the clean blocks that the noisy copy sees
    # A noisy block is needed if it has a masked token, or if a later one that has sees it: +1 at the first block that a
    # masked one sees, -1 behind itself.
    deltas = torch.zeros(num_rows, num_blocks + 1, dtype=torch.int64, device=device)
    deltas.scatter_add_(1, earliest, masked.long()).scatter_add_(1, block + 1, -masked.long())
    keep_noisy = (deltas.cumsum(1) > 0).gather(1, block) & (sample_ids >= 0)
    # Of each sample, only the clean blocks that a kept noisy one sees are needed.
    num_samples = int(sample_ids.max()) + 2
    end = torch.full((num_rows, num_samples), -1, device=device, dtype=torch.long)
    end.scatter_reduce_(1, sample_ids + 1, torch.where(keep_noisy, clean_end, -1), "amax")
    keep_clean = (block < end.gather(1, sample_ids + 1)) & (sample_ids >= 0)

    keep = torch.cat([keep_noisy, keep_clean], dim=1)  # (B, 2L)
    width = max(1, int(keep.sum(1).max()))
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)[:, :width]  # kept tokens first, in order
    valid = keep.gather(1, order)
    noisy = order < length
    source = order % length
    block, start, earliest, clean_end = (t.gather(1, source) for t in (block, start, earliest, clean_end))
    place, slots = positions.gather(1, source), torch.arange(width, device=device).expand(num_rows, -1)
    clean_before = (place % block_length == 0) & (block == earliest)
    before = torch.where(place == 0, order, source - 1 + length * clean_before)
    before = torch.zeros_like(keep, dtype=torch.long).scatter_(1, order, slots).gather(1, before)
    # Codes of noisy keys follow those of all clean keys; padding is visible to padding only.
    noisy_code = num_blocks + block

    def own(of_noisy: Tensor) -> Tensor:
        return torch.where(valid, torch.where(noisy, of_noisy, NO_KEY), PADDING).int()

    layout = Layout(
        low=torch.where(valid, start, 0).int(),
        high=torch.where(valid, torch.where(noisy, clean_end - 1, block), NO_KEY).int(),
        own=own(noisy_code),
        code=torch.where(valid, torch.where(noisy, noisy_code, block), PADDING).int(),
        own_low=None if first_noisy is None else own(num_blocks + earliest),
    )
    return PackedTokens(source, noisy, valid, layout, before)
