"""From hidden states to tokens, commits and the next residuals, for all requests of a pass together.

The head runs in tiles over masked positions; each tile of logits is reduced at once to (token, confidence, entropy)
and, for requests with residuals, (alpha, delta). Nothing of size N x V outlives its tile.

Shapes: N masked positions of all requests, M tokens of the pass, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.decoding.feedback import temperatures
from rcd_core.decoding.policies import POLICIES, BlockView
from rcd_core.decoding.sampling import SamplingColumns, SpecialTokens, choose_tokens
from rcd_core.decoding.sequence import Sequence
from rcd_core.decoding.state import ResidualState
from rcd_core.families.base import DiffusionModel
from rcd_core.noise import hash_key, uniforms
from rcd_core.ops.reduce import Feedback, Table, reduce_greedy
from rcd_core.signals import DenseSignals

TILE_BYTES = 64 << 20  # fp32 logits held at once
Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Reached:
    """The masked positions that a step predicts: absolute positions (N,), request by request, whose they are (N,), and
    where each request's end (one number per request)."""

    sequences: list[Sequence]
    positions: Positions
    owner: Positions
    ends: Positions

    @classmethod
    def of(cls, sequences: list[Sequence]) -> Reached:
        counts = [len(s.open) for s in sequences]
        positions = np.concatenate([np.zeros(0, dtype=np.int64), *(s.open for s in sequences)])
        return cls(sequences, positions, np.repeat(np.arange(len(sequences)), counts), np.cumsum(counts))

    def places(self, reach: int) -> Positions:
        """(N,) in the residual state, of which each slot has `reach` places."""
        return self.positions + np.array([s.slot * reach - s.block[0] for s in self.sequences], np.int64)[self.owner]

    def per_request(self, value: Callable[[Sequence], float]) -> NDArray[np.float64]:
        """(N,) a property of each position's request."""
        return np.array([value(s) for s in self.sequences], dtype=np.float64)[self.owner]


class Predictor:
    """Head and reduction of one model; the residuals go into `state`."""

    def __init__(self, model: DiffusionModel, state: ResidualState) -> None:
        self.model, self.state = model, state
        self.table = Table(model.embedding.weight, model.learned_alpha)
        self.tile = max(1, TILE_BYTES // (4 * model.vocab_size))

    def greedy(self, hidden: Tensor, places: Tensor, feedback: Feedback | None, with_entropy: bool) -> Tensor:
        """(3, N) fp32: tokens, confidence, entropy, for requests that all decode greedily and feed back alike.

        hidden (N, D) at the masked positions; places (N,) in the residual state. No host synchronisation.
        """
        if len(hidden) <= self.tile:
            return self._reduced(self.model.head(hidden).float(), places, feedback, with_entropy)
        tiles = zip(torch.split(hidden, self.tile), torch.split(places, self.tile), strict=True)
        found = [self._reduced(self.model.head(h).float(), out, feedback, with_entropy) for h, out in tiles]
        return torch.cat(found, 1)

    def mixed(self, reached: Reached, hidden: Tensor, places: Tensor, bare: Tensor | None) -> Tensor:
        """The same for requests of all kinds; bare (N, D): the pass without the prompt, for guidance."""
        columns, device = _sampling_columns(self.model, reached), hidden.device
        guidance = torch.from_numpy(reached.per_request(lambda s: s.settings.cfg_scale)).float().to(device)
        special = SpecialTokens(self.model.mask_token_id, self.model.info.eos_token_ids, self.model.info.end_token_ids)
        found = torch.empty(3, len(hidden), device=device)
        kinds = [s.feedback for s in reached.sequences]
        for kind in dict.fromkeys(kinds):
            mine = np.flatnonzero(np.array([k == kind for k in kinds])[reached.owner])
            for rows in torch.split(torch.from_numpy(mine).to(device), self.tile):
                logits = self.model.head(hidden[rows]).float()
                if bare is not None:
                    scale, plain = guidance[rows, None], self.model.head(bare[rows]).float()
                    # Scale 0 is no guidance: (0 + 1) * (z - u) + u would differ from z by rounding.
                    logits = torch.where(scale > 0, plain + (scale + 1) * (logits - plain), logits)
                tokens, confidence = choose_tokens(
                    logits, columns[rows], special, not self.model.blocks_from_prompt_end
                )
                found[:, rows] = self._reduced(logits, places[rows], kind)
                found[0, rows], found[1, rows] = tokens.float(), confidence
        return found

    def _reduced(self, logits: Tensor, places: Tensor, feedback: Feedback | None, with_entropy: bool = True) -> Tensor:
        reduced = reduce_greedy(logits, self.model.mask_token_id, feedback, self.table, with_entropy)
        if reduced.alpha is not None and reduced.delta is not None:
            self.state.write(places, reduced.alpha, reduced.delta)
        # Tokens as fp32 numbers are exact up to 2^24.
        return torch.stack([reduced.tokens.float(), reduced.confidence, reduced.entropy])


def dirichlet(model: DiffusionModel, s: Sequence, positions: Positions) -> DenseSignals:
    """p ~ Dirichlet(1, ..., 1) at each position: normalised exponentials, keyed by seed and position (start)."""
    draws = [uniforms(hash_key("dirichlet", s.settings.seed or 0, int(p)), model.vocab_size) for p in positions]
    exponentials = -np.log1p(-np.stack(draws))
    logits = torch.from_numpy(np.log(np.maximum(exponentials, 1e-30))).float().to(model.device)
    return DenseSignals(logits, **temperatures(s.settings))


def _sampling_columns(model: DiffusionModel, reached: Reached) -> SamplingColumns:
    uniform = np.zeros(len(reached.positions))
    for i, (owner, position) in enumerate(zip(reached.owner.tolist(), reached.positions.tolist(), strict=True)):
        s = reached.sequences[owner]
        if s.settings.temperature > 0:
            uniform[i] = uniforms(hash_key(s.settings.seed or 0, position, s.step), 1)[0]

    def column(value: Callable[[Sequence], float], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(reached.per_request(value)).to(dtype).to(model.device)

    return SamplingColumns(
        temperature=column(lambda s: s.settings.temperature, torch.float32),
        top_k=column(lambda s: s.settings.top_k or model.vocab_size, torch.int64),
        top_p=column(lambda s: s.settings.top_p or 1.0, torch.float32),
        uniform=torch.from_numpy(uniform).to(model.device),
        filtered=column(lambda s: s.settings.filtered_confidence, torch.bool),
        no_eos=column(lambda s: s.settings.logits_eos_inf, torch.bool),
        eos_last=column(lambda s: s.settings.confidence_eos_eot_inf, torch.bool),
    )


def select(
    model: DiffusionModel, reached: Reached, confidence: NDArray[np.float32], entropy: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """(N,) which positions are committed: of each request's block, by its own policy."""
    sequences, owner = reached.sequences, reached.owner
    starts, ends = np.array([s.block for s in sequences]).T
    wide = any(s.wide for s in sequences)
    inside = reached.positions < ends[owner] if wide else slice(None)
    num_columns = int((ends - starts).max())
    at = (owner * num_columns + reached.positions - starts[owner])[inside]  # in the grids below, laid end to end
    shape = (len(sequences), num_columns)
    masked = np.zeros(shape, dtype=bool)
    grids = np.zeros((3, *shape))
    masked.ravel()[at] = True
    grids[0].ravel()[at] = confidence[inside]
    policies = [s.settings.policy for s in sequences]
    kinds = set(policies)
    if "entropy_bounded" in kinds:
        grids[1].ravel()[at] = entropy[inside]
    if "random" in kinds:
        places = zip(owner.tolist(), reached.positions.tolist(), strict=True)
        grids[2].ravel()[at] = np.array([_lot(sequences[i], p) for i, p in places])[inside]
    quota = np.array([s.quota() for s in sequences])
    threshold = np.array([s.settings.confidence_threshold for s in sequences])
    bound = np.array([s.settings.entropy_bound or 0.0 for s in sequences])
    chosen = np.zeros(shape, dtype=bool)
    for policy in kinds:
        mine = slice(None) if len(kinds) == 1 else np.array([p == policy for p in policies])
        view = BlockView(
            masked[mine],
            grids[0, mine],
            grids[1, mine],
            grids[2, mine],
            quota[mine],
            threshold[mine],
            bound[mine],
            model.threshold_inclusive,
        )
        chosen[mine] = POLICIES[policy](view)
    commit = np.zeros(len(owner), dtype=bool)
    commit[inside] = chosen.ravel()[at]
    return commit


def _lot(s: Sequence, position: int) -> float:
    if s.settings.policy != "random":
        return 0.0
    return float(uniforms(hash_key("lot", s.settings.seed or 0, position, s.step), 1)[0])
