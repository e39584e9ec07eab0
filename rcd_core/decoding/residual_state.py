"""The residual state of all requests: alpha and delta of the masked positions of each request's live blocks; with
Loopholing the last pass's states at all of their positions, in place of delta.

The state is kept in place, by slot: a pass reads and writes rows of two tensors by index, whichever requests take part,
so no tensors are made per request and shapes stay the same from pass to pass.

Shapes: S slots, P positions per slot, N positions, T tokens of a pass, D width. Position p of slot s has row
s P + p mod P, so live blocks must span no more than P positions.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rcd_core.alpha import block_alpha, position_rule, ramp_weight
from rcd_core.decode_settings import BLOCK_RULES
from rcd_core.decoding.chunk import Positions
from rcd_core.decoding.masked_positions import MaskedPositions
from rcd_core.decoding.sequence import LiveBlock, Sequence
from rcd_core.decoding.vocabulary import vocabulary_of
from rcd_core.dense_signals import DenseSignals
from rcd_core.families.base import DiffusionModel
from rcd_core.ops.random import device_uniforms, position_keys
from rcd_core.precision import reduction_dtype
from rcd_core.signals import ReferenceSignals, Signals


class ResidualState:
    """alpha (S P + 2,), fp32 or wider, and delta (S P + 2, D) in the model's dtype. The two extra rows serve passes of
    fixed shape: zero_row always has alpha 0, for tokens without a residual; discard_row takes results of padding."""

    def __init__(self, model: DiffusionModel, num_slots: int) -> None:
        self.model, self.num_slots, self.vocabulary = model, num_slots, vocabulary_of(model)
        self.positions_per_slot = 0
        self.alpha, self.delta = self._zeros(0)

    def _zeros(self, positions_per_slot: int) -> tuple[Tensor, Tensor]:
        num_rows, width = self.num_slots * positions_per_slot + 2, self.model.embedding.weight.shape[1]
        alpha = torch.zeros(num_rows, dtype=reduction_dtype(self.model.dtype), device=self.model.device)
        return alpha, torch.zeros(num_rows, width, dtype=self.model.dtype, device=self.model.device)

    @property
    def zero_row(self) -> int:
        return self.num_slots * self.positions_per_slot

    @property
    def discard_row(self) -> int:
        return self.zero_row + 1

    def reserve(self, positions_per_slot: int, live: Many[Sequence] = ()) -> bool:
        """Make room for this many positions of each slot, and keep what the requests `live` have. Returns whether the
        tensors moved."""
        before = self.positions_per_slot
        if positions_per_slot <= before:
            return False
        tensors = self._zeros(positions_per_slot)
        for s in live:
            first, end = s.residual_span
            span = np.arange(first, min(first + before, end))
            old, new = (
                torch.from_numpy(s.slot * p + span % p).to(self.model.device) for p in (before, positions_per_slot)
            )
            for after, now in zip(tensors, (self.alpha, self.delta), strict=True):
                after[new] = now[old]
        (self.alpha, self.delta), self.positions_per_slot = tensors, positions_per_slot
        return True

    def rows_of(self, masked: MaskedPositions) -> Positions:
        """(N,) rows of the state, 0 where it has none."""
        if not self.positions_per_slot:
            return np.zeros(len(masked.positions), dtype=np.int64)
        slots = np.array([b.sequence.slot for b in masked.blocks], np.int64)[masked.owner]
        return slots * self.positions_per_slot + masked.positions % self.positions_per_slot

    def blend(self, embeds: Tensor, rows: Tensor) -> Tensor:
        """Eq. 2: (T, D) token embeddings, (T,) rows of the state -> (T, D) inputs. Where alpha is 0 they are the
        embeddings, bit for bit. With Loopholing its own sum, with or without a state."""
        if self.model.loophole is not None:
            inputs: Tensor = self.model.loophole(embeds, F.embedding(rows, self.delta))
            return inputs
        alpha = self.alpha[rows].to(embeds.dtype).unsqueeze(-1)
        return torch.lerp(embeds, F.embedding(rows, self.delta), alpha)

    def write(self, rows: Tensor, alpha: Tensor, delta: Tensor) -> None:
        """rows (N,), alpha (N,), delta (N, D)."""
        self.alpha.index_copy_(0, rows, alpha.to(self.alpha.dtype))
        self.delta.index_copy_(0, rows, delta.to(self.delta.dtype))

    def keep(self, rows: Tensor, states: Tensor) -> None:
        """Loopholing: states (T, D) of a pass at rows (T,)."""
        self.delta.index_copy_(0, rows, states.to(self.delta.dtype))

    def start_block(self, block: LiveBlock, positions: Positions, signals: Signals) -> None:
        """Fill the residual of (N,) positions from signals: a reference's, or a random distribution's."""
        if isinstance(signals, ReferenceSignals):
            signals = signals.to(self.model.device)
        alpha, delta = self.vocabulary.residual(signals, position_rule(block.settings), block.settings.alpha_scale)
        rows = block.sequence.slot * self.positions_per_slot + positions % self.positions_per_slot
        self.write(torch.from_numpy(rows).to(self.model.device), alpha, delta)
        block.has_residual = True
        self.apply_block_rules([block])

    def apply_block_rules(self, blocks: Many[LiveBlock]) -> None:
        """Replace alpha where the rule is "uniform" or "ramp". Called when the pass has committed its tokens, so that
        the mean of "uniform" is over the positions that stay masked, as in training."""
        affected = [b for b in blocks if b.has_residual and b.settings.residual and b.settings.alpha in BLOCK_RULES]
        if not affected:
            return
        masked = MaskedPositions.of(affected, masked_only=True)
        rows, owner = (torch.from_numpy(n).to(self.model.device) for n in (self.rows_of(masked), masked.owner))
        ramp = masked.per_block(lambda b: ramp_weight(b.step) if b.settings.alpha == "ramp" else -1.0)
        alpha = block_alpha(self.alpha[rows], owner, torch.from_numpy(ramp).to(self.alpha))
        self.alpha.index_copy_(0, rows, alpha)

    def input_alpha(self, masked: MaskedPositions, observed: bool) -> NDArray[np.float32]:
        """(N,) alpha in the input of the coming pass; zeros for requests without a trace unless observed."""
        alpha = np.zeros(len(masked.positions), dtype=np.float32)
        needed = [b.has_residual and (observed or b.settings.trace) for b in masked.blocks]
        if any(needed):
            where = np.array(needed)[masked.owner]
            if masked.filled is not None:
                where &= ~masked.filled
            rows = torch.from_numpy(self.rows_of(masked)[where]).to(self.model.device)
            alpha[where] = self.alpha[rows].float().cpu().numpy()
        return alpha


def dirichlet_signals(block: LiveBlock) -> DenseSignals:
    """Start "dirichlet": p ~ Dirichlet(1, ..., 1) at each masked position, as normalised exponentials that are keyed by
    seed and position."""
    model = block.sequence.model
    keys = position_keys("dirichlet", block.settings.seed, block.masked_positions)
    uniform = device_uniforms(torch.from_numpy(keys.view(np.int64)).to(model.device), model.vocab_size)
    logits = torch.log((-torch.log1p(-uniform)).clamp_(min=1e-30)).float()
    return DenseSignals(logits, **block.settings.temperatures)
