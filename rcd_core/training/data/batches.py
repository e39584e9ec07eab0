"""Collation: packs training rows, pads them, draws residual dropout, and prepares the next step in a thread.

Shapes: B packed rows, L tokens, N masked positions in row-major order, P self-residual passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.noise import NoiseSettings, blocks_from_label, group_starts, hash_key, nested_masks, uniforms
from rcd_core.signals import ReferenceSignals
from rcd_core.training.controls import same_masks
from rcd_core.training.data.rows import RowSource, TrainingRow
from rcd_core.training.objective import IGNORED, TrainingBatch
from rcd_core.training.settings import ResidualSettings, TrainSettings

MAX_PASSES = 2  # self-residual passes before the trained one: 1 or 2 per row, drawn uniformly
GAP = (0.03, 0.3)  # each earlier pass adds this much to the row's masking probability, drawn uniformly


@dataclass(frozen=True)
class MicroBatch:
    """keep (N,): 0 where residual dropout strikes, else 1. For sources that run the model itself: noisier_masks
    (P, B, L) bool, inputs of the earlier passes, noisiest first; num_passes (B, L), how many of them each row uses."""

    rows: list[TrainingRow]
    batch: TrainingBatch
    signals: ReferenceSignals | None
    keep: Tensor
    noisier_masks: Tensor | None = None
    num_passes: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        movable = Tensor | TrainingBatch | ReferenceSignals
        moved: dict[str, Any] = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, movable)}
        return replace(self, **moved)


def pack(rows: Sequence[TrainingRow], pack_length: int | None) -> list[list[TrainingRow]]:
    """First fit, in order: rows share a packed row of at most pack_length tokens; a longer row gets its own. None: no
    packing."""
    bins: list[list[TrainingRow]] = []
    sizes: list[int] = []
    for row in rows:
        size = len(row.input_ids)
        fitting = (i for i, used in enumerate(sizes) if pack_length is not None and used + size <= pack_length)
        index = next(fitting, None)
        if index is None:
            bins.append([row])
            sizes.append(size)
        else:
            bins[index].append(row)
            sizes[index] += size
    return bins


def collate(
    rows: Sequence[TrainingRow],
    *,
    mask_token_id: int,
    pad_token_id: int,
    block_length: int,
    noise: NoiseSettings | None = None,
) -> tuple[TrainingBatch, ReferenceSignals | None]:
    """`collate_packed` with one row in each packed row."""
    ids = {"mask_token_id": mask_token_id, "pad_token_id": pad_token_id, "block_length": block_length}
    return collate_packed([[row] for row in rows], **ids, noise=noise)


def collate_packed(
    bins: Sequence[Sequence[TrainingRow]],
    *,
    mask_token_id: int,
    pad_token_id: int,
    block_length: int,
    noise: NoiseSettings | None = None,
) -> tuple[TrainingBatch, ReferenceSignals | None]:
    """(B, L) batch, padded on the right, and the rows' signals (N) in row-major order of the masked positions. noise:
    how the rows were masked; its layout decides what noisy tokens see.

    Rejected rows have no tokens and leave no trace; a batch of rejected rows is all padding.
    """
    shape = (len(bins), max([block_length, *(sum(len(r.input_ids) for r in rows) for rows in bins)]))
    ids, labels = np.full(shape, pad_token_id), np.full(shape, IGNORED)
    masked, samples = np.zeros(shape, dtype=bool), np.full(shape, -1)
    positions, p = np.zeros(shape, dtype=np.int64), np.ones(shape, dtype=np.float32)
    first_noisy, blocks = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    layout = noise.layout if noise is not None else "single"
    for i, rows in enumerate(bins):
        for sample, (row, tokens) in enumerate(_placed(rows)):
            part = (i, tokens)
            ids[part], labels[part], masked[part], samples[part] = row.input_ids, row.labels, row.masked, sample
            positions[part], p[part] = np.arange(len(row.input_ids)), row.p
            if noise is not None and layout == "d2f":
                blocks[part] = blocks_from_label(row.labels != IGNORED, noise)
            if noise is not None and layout == "multi_block":
                starts = group_starts(row.labels != IGNORED, row.example_id, row.draw, noise)
                first_noisy[part] = starts.repeat(block_length)[: len(row.input_ids)]
    batch = TrainingBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        noisy_ids=torch.from_numpy(np.where(masked, mask_token_id, ids)),
        masked=torch.from_numpy(masked),
        p_mask=torch.from_numpy(p),
        block_length=block_length,
        sample_ids=torch.from_numpy(samples),
        positions=torch.from_numpy(positions),
        first_noisy=torch.from_numpy(first_noisy) if layout == "multi_block" else None,
        blocks=torch.from_numpy(blocks) if layout == "d2f" else None,
    )
    signals = [r.signals for rows in bins for r in rows if r.signals is not None]
    return batch, ReferenceSignals.cat(signals) if signals else None


def _placed(rows: Sequence[TrainingRow]) -> list[tuple[TrainingRow, slice]]:
    """The rows that have tokens, each with its place in the packed row."""
    ends = accumulate(len(row.input_ids) for row in rows)
    placed = [(row, slice(end - len(row.input_ids), end)) for row, end in zip(rows, ends, strict=True)]
    return [(row, tokens) for row, tokens in placed if len(row.input_ids)]


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Turns one worker's rows of a step into micro-batches. noise: how the rows were masked; for its layout, and for
    sources that need noisier versions of the rows."""

    settings: TrainSettings
    residual: ResidualSettings
    mask_token_id: int
    pad_token_id: int
    block_length: int
    block_diffusion: bool  # SDAR: lay out [noisy | clean] here, off the device
    noise: NoiseSettings | None = None
    block_warmup: float = 0.0  # share of the steps

    def micro_batches(self, rows: Sequence[TrainingRow], step: int | None = None) -> list[MicroBatch]:
        """step: of the training; None: after the warm-up of blocks."""
        bins = pack(rows, self.settings.pack_length)
        size = self.settings.micro_batch_size or len(bins)
        blocks, own = self.block_length_at(step), self.residual.needs_noisier or self._is_own(step)
        return [self._micro_batch(bins[i : i + size], blocks, own) for i in range(0, len(bins), size)]

    def _is_own(self, step: int | None) -> bool:
        """Whether the step takes self-residual in place of signals: the same on all ranks."""
        share = self.residual.self_share
        if step is None or not share:
            return False
        return bool(uniforms(hash_key("self_share", self.settings.seed, step), 1)[0] < share)

    def block_length_at(self, step: int | None) -> int:
        """During the warm-up, the divisors of block_length in turn, from 1, which is causal attention."""
        smaller = [length for length in range(1, self.block_length) if self.block_length % length == 0]
        warm = round(self.block_warmup * self.settings.steps)
        if step is None or step >= warm or not smaller:
            return self.block_length
        return smaller[step * len(smaller) // warm]

    def _micro_batch(self, bins: list[list[TrainingRow]], block_length: int, own: bool) -> MicroBatch:
        ids = {"mask_token_id": self.mask_token_id, "pad_token_id": self.pad_token_id}
        batch, signals = collate_packed(bins, **ids, block_length=self.block_length, noise=self.noise)
        batch = replace(batch, block_length=block_length)
        batch = batch.with_packed() if self.block_diffusion else batch
        rows = [row for packed_row in bins for row in packed_row]
        micro = MicroBatch(rows, batch, None if own else signals, self._keep(rows))
        return self._with_noisier_masks(micro, bins) if own else micro

    def _keep(self, rows: list[TrainingRow]) -> Tensor:
        """(N,) residual dropout, drawn per row by a hash of its index."""
        counts = [int(row.masked.sum()) for row in rows]
        if not self.residual.dropout:
            return torch.ones(sum(counts))
        kept = [float(self._uniforms("residual_dropout", row, 1)[0] >= self.residual.dropout) for row in rows]
        return torch.from_numpy(np.repeat(kept, counts)).float()

    def _uniforms(self, purpose: str, row: TrainingRow, count: int) -> NDArray[np.float64]:
        return uniforms(hash_key(purpose, self.settings.seed, row.index), count)

    def _with_noisier_masks(self, micro: MicroBatch, bins: list[list[TrainingRow]]) -> MicroBatch:
        shape = tuple(micro.batch.masked.shape)
        masks, num_passes = np.zeros((MAX_PASSES, *shape), dtype=bool), np.zeros(shape, dtype=np.int64)
        for i, rows in enumerate(bins):
            for row, tokens in _placed(rows):
                u = self._uniforms("previous_passes", row, 1 + MAX_PASSES)
                count = 1 + int(u[0] * MAX_PASSES)
                nearest_first = self._noisier(row, u[1:])[:count]
                nearest_first += nearest_first[-1:] * (MAX_PASSES - count)
                masks[:, i, tokens], num_passes[i, tokens] = np.stack(nearest_first[::-1]), count
        return replace(micro, noisier_masks=torch.from_numpy(masks), num_passes=torch.from_numpy(num_passes))

    def _noisier(self, row: TrainingRow, u: NDArray[np.float64]) -> list[NDArray[np.bool_]]:
        if self.residual.source == "self_same":
            return same_masks(row.masked, len(u))
        assert self.noise is not None
        gaps = [GAP[0] + float(x) * (GAP[1] - GAP[0]) for x in u]
        noisier = nested_masks(row.labels != IGNORED, row.example_id, row.draw, self.noise, gaps)
        return [mask | row.masked for mask in noisier]  # a row with an on-policy mask has another than its draw's


def prefetch(
    source: RowSource, collator: Collator, rank: int, world: int, first: int, end: int
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """(step, this rank's micro-batches) of the steps [first, end); a thread prepares each during the one before."""
    settings = collator.settings

    def prepare(step: int) -> list[MicroBatch]:
        indices = range(step * settings.batch_size + rank, (step + 1) * settings.batch_size, world)
        return collator.micro_batches([source.row(g) for g in indices], step)

    if first >= end:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="rows") as pool:
        upcoming = pool.submit(prepare, first)
        for step in range(first, end):
            current = upcoming.result()
            if step + 1 < end:
                upcoming = pool.submit(prepare, step + 1)
            yield step, current
