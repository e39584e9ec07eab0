"""From training rows to micro-batches: packing, padding, residual dropout; the next step is prepared meanwhile.

Shapes: B packed rows, L tokens, N masked positions in row-major order, C noisier versions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.noise import NoiseSettings, hash_key, nested_masks, uniforms
from rcd_core.residual import ResidualSettings
from rcd_core.signals import ReferenceSignals
from rcd_core.training.data.rows import RowSource, TrainingRow
from rcd_core.training.objective import IGNORED, TrainingBatch
from rcd_core.training.settings import TrainSettings

# Previous passes of a row trained on the model's own residuals, and how much noisier each is (the small trials behind
# the source "self" drew 1 or 2 passes and gaps from this range).
MAX_PASSES = 2
GAP = (0.03, 0.3)


@dataclass(frozen=True)
class MicroBatch:
    """keep (N,): 0 where residual dropout strikes. chain (C, B, L) bool, noisiest first, and depth (B, L), the previous
    passes of each token's row: only for sources that run the model itself."""

    rows: list[TrainingRow]
    batch: TrainingBatch
    signals: ReferenceSignals | None
    keep: Tensor
    chain: Tensor | None = None
    depth: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        kinds = Tensor | TrainingBatch | ReferenceSignals
        moved: dict[str, Any] = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, kinds)}
        return replace(self, **moved)


def pack(rows: Sequence[TrainingRow], pack_length: int | None) -> list[list[TrainingRow]]:
    """Rows put one after another into packed rows of at most pack_length tokens, first fit in order; a longer row
    stands alone. None: one each."""
    bins: list[list[TrainingRow]] = []
    sizes: list[int] = []
    for row in rows:
        size = len(row.input_ids)
        at = next((i for i, n in enumerate(sizes) if pack_length is not None and n + size <= pack_length), None)
        if at is None:
            bins.append([row])
            sizes.append(size)
        else:
            bins[at].append(row)
            sizes[at] += size
    return bins


def collate(
    rows: Sequence[TrainingRow], *, mask_token_id: int, pad_token_id: int, block_length: int
) -> tuple[TrainingBatch, ReferenceSignals | None]:
    """Rows side by side, none of them packed."""
    ids = {"mask_token_id": mask_token_id, "pad_token_id": pad_token_id, "block_length": block_length}
    return collate_packed([[row] for row in rows], **ids)


def collate_packed(
    bins: Sequence[Sequence[TrainingRow]], *, mask_token_id: int, pad_token_id: int, block_length: int
) -> tuple[TrainingBatch, ReferenceSignals | None]:
    """Packed rows side by side, padded at the end; signals joined in row-major order of the masked positions.

    A row without tokens leaves nothing behind; a batch of such rows is padding from end to end.
    """
    shape = (len(bins), max([block_length, *(sum(len(r.input_ids) for r in rows) for rows in bins)]))
    ids, labels = np.full(shape, pad_token_id), np.full(shape, IGNORED)
    masked, samples = np.zeros(shape, dtype=bool), np.full(shape, -1)
    positions, p = np.zeros(shape, dtype=np.int64), np.ones(shape, dtype=np.float32)
    for i, rows in enumerate(bins):
        at = 0
        for number, row in enumerate(r for r in rows if len(r.input_ids)):
            part = (i, slice(at, at + len(row.input_ids)))
            ids[part], labels[part], masked[part], samples[part] = row.input_ids, row.labels, row.masked, number
            positions[part], p[part] = np.arange(len(row.input_ids)), row.p
            at += len(row.input_ids)
    batch = TrainingBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        noisy_ids=torch.from_numpy(np.where(masked, mask_token_id, ids)),
        masked=torch.from_numpy(masked),
        p_mask=torch.from_numpy(p),
        block_length=block_length,
        sample_ids=torch.from_numpy(samples),
        positions=torch.from_numpy(positions),
    )
    cached = [r.signals for rows in bins for r in rows if r.signals is not None]
    return batch, ReferenceSignals.cat(cached) if cached else None


@dataclass(frozen=True, kw_only=True)
class Collator:
    """What turns a step's rows into micro-batches. noise: that of the rows, for sources that need noisier versions."""

    settings: TrainSettings
    residual: ResidualSettings
    mask_token_id: int
    pad_token_id: int
    block_length: int
    block_diffusion: bool  # SDAR: lay out [noisy | clean] here, off the device
    noise: NoiseSettings | None = None

    def micro_batches(self, rows: Sequence[TrainingRow]) -> list[MicroBatch]:
        bins = pack(rows, self.settings.pack_length)
        size = self.settings.micro_batch_size or len(bins)
        return [self._micro_batch(bins[i : i + size]) for i in range(0, len(bins), size)]

    def _micro_batch(self, bins: list[list[TrainingRow]]) -> MicroBatch:
        batch, signals = collate_packed(
            bins, mask_token_id=self.mask_token_id, pad_token_id=self.pad_token_id, block_length=self.block_length
        )
        batch = batch.with_packed() if self.block_diffusion else batch
        rows = [row for part in bins for row in part]
        micro = MicroBatch(rows, batch, signals, self._keep(rows))
        return self._with_chain(micro, bins) if self.residual.runs_model else micro

    def _keep(self, rows: list[TrainingRow]) -> Tensor:
        """(N,) by hash of the row's place in training."""
        counts = [int(row.masked.sum()) for row in rows]
        if not self.residual.dropout:
            return torch.ones(sum(counts))
        kept = [float(self._uniforms("residual_dropout", row, 1)[0] >= self.residual.dropout) for row in rows]
        return torch.from_numpy(np.repeat(kept, counts)).float()

    def _uniforms(self, purpose: str, row: TrainingRow, count: int) -> NDArray[np.float64]:
        return uniforms(hash_key(purpose, self.settings.seed, row.index), count)

    def _with_chain(self, micro: MicroBatch, bins: list[list[TrainingRow]]) -> MicroBatch:
        """Masks of the noisier inputs that the model's own previous passes see."""
        shape = tuple(micro.batch.masked.shape)
        chain, depth = np.zeros((MAX_PASSES, *shape), dtype=bool), np.zeros(shape, dtype=np.int64)
        for i, rows in enumerate(bins):
            at = 0
            for row in (r for r in rows if len(r.input_ids)):
                part = slice(at, at + len(row.input_ids))
                u = self._uniforms("previous_passes", row, 1 + MAX_PASSES)
                passes = 1 + int(u[0] * MAX_PASSES)
                nearest_first = self._noisier(row, u[1:])[:passes]
                nearest_first += nearest_first[-1:] * (MAX_PASSES - passes)
                chain[:, i, part], depth[i, part] = np.stack(nearest_first[::-1]), passes
                at += len(row.input_ids)
        return replace(micro, chain=torch.from_numpy(chain), depth=torch.from_numpy(depth))

    def _noisier(self, row: TrainingRow, u: NDArray[np.float64]) -> list[NDArray[np.bool_]]:
        if self.residual.source == "self_same":
            return [row.masked] * len(u)
        assert self.noise is not None
        gaps = [GAP[0] + float(x) * (GAP[1] - GAP[0]) for x in u]
        return nested_masks(row.labels != IGNORED, row.example_id, row.draw, self.noise, gaps)


def prefetched(
    source: RowSource, maker: Collator, rank: int, world: int, first: int
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """This rank's share of the steps from `first` on, each prepared in a thread while the one before is computed."""
    settings = maker.settings

    def prepare(step: int) -> list[MicroBatch]:
        mine = range(step * settings.batch_size + rank, (step + 1) * settings.batch_size, world)
        return maker.micro_batches([source.row(g) for g in mine])

    with ThreadPoolExecutor(1, thread_name_prefix="rows") as pool:
        following = pool.submit(prepare, first) if first < settings.steps else None
        for step in range(first, settings.steps):
            assert following is not None
            current = following.result()
            following = pool.submit(prepare, step + 1) if step + 1 < settings.steps else None
            yield step, current
