"""From hidden states to tokens, commits and the next residuals, for all requests of a pass together.

The head runs in tiles over masked positions; each tile of logits is reduced at once to (token, confidence, entropy)
and, for requests with residuals, (alpha, delta). Nothing of size N x V outlives its tile.

Shapes: N masked positions of all requests, V vocabulary, D width; per request (n,) of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.decoding.policies import POLICIES, BlockView
from rcd_core.decoding.sampling import SamplingColumns, SpecialTokens, choose_tokens
from rcd_core.decoding.sequence import Sequence
from rcd_core.decoding.settings import DecodeSettings
from rcd_core.families.base import DiffusionModel
from rcd_core.noise import hash_key, uniforms
from rcd_core.residual import AlphaRule, entropy
from rcd_core.signals import DenseSignals, ReferenceSignals, Signals, residual_state

_TILE_BYTES = 64 << 20  # fp32 logits held at once
Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Prediction:
    """For one request's positions (n,): the tokens, their confidence, the entropy in nats of the whole prediction,
    which to commit, and the residual there."""

    tokens: NDArray[np.int64]
    confidence: NDArray[np.float32]
    entropy: NDArray[np.float32]
    commit: NDArray[np.bool_]
    residual: tuple[Tensor, Tensor] | None  # (n,) alpha, (n, D) delta


def temperatures(settings: DecodeSettings) -> dict[str, float]:
    """T_res is for alpha only, unless delta_temperature says otherwise (Algorithm 2, lines 23-25)."""
    t = settings.residual_temperature or 1.0
    return {"alpha_temperature": t, "delta_temperature": t if settings.delta_temperature == "residual" else 1.0}


@dataclass(frozen=True)
class _ResidualKind:
    """Requests alike in this share one computation of (alpha, delta)."""

    rule: AlphaRule
    alpha_scale: float | None
    alpha_temperature: float
    delta_temperature: float
    top_k: int | None

    @classmethod
    def of(cls, settings: DecodeSettings) -> _ResidualKind | None:
        """None for a request that feeds nothing back from its own predictions."""
        if not settings.residual or settings.residual_source != "self":
            return None
        return cls(
            rule=settings.alpha or "normalized_entropy",
            alpha_scale=settings.alpha_scale,
            top_k=settings.residual_top_k,
            **temperatures(settings),
        )

    def state(self, logits: Tensor, embedding_weight: Tensor) -> tuple[Tensor, Tensor]:
        t = (self.alpha_temperature, self.delta_temperature)
        signals: Signals
        if self.top_k is None:
            signals = DenseSignals(logits, *t)
        else:
            signals = ReferenceSignals.from_logits(logits, self.top_k, alpha_temperature=t[0], delta_temperature=t[1])
        return residual_state(signals, embedding_weight, self.rule, self.alpha_scale)


def predict(
    model: DiffusionModel, sequences: list[Sequence], reached: list[Positions], hidden: Tensor, bare: Tensor | None
) -> list[Prediction]:
    """hidden (N, D) at the reached positions of each request in turn; bare (N, D) the same without the prompt, for
    classifier-free guidance."""
    counts = [len(p) for p in reached]
    owner = np.repeat(np.arange(len(sequences)), counts)
    columns = _sampling_columns(model, sequences, reached)
    guidance = torch.tensor([s.settings.cfg_scale for s in sequences], device=hidden.device)
    kinds = [_ResidualKind.of(s.settings) for s in sequences]
    feeding = any(kinds)
    alpha = torch.zeros(len(owner) if feeding else 0, device=hidden.device)
    delta = torch.zeros(len(alpha), hidden.shape[1], device=hidden.device, dtype=hidden.dtype)
    special = SpecialTokens(model.mask_token_id, model.info.eos_token_ids, model.info.end_token_ids)
    tokens, confidence, entropies = [], [], []
    tile = max(1, _TILE_BYTES // (4 * model.vocab_size))
    for start in range(0, len(owner), tile):
        rows = slice(start, min(start + tile, len(owner)))
        logits = model.head(hidden[rows]).float()
        if bare is not None:
            scale = guidance[torch.from_numpy(owner[rows]).to(hidden.device), None]
            plain = model.head(bare[rows]).float()
            # Scale 0 is no guidance: (0 + 1) * (z - u) + u would differ from z by rounding.
            logits = torch.where(scale > 0, plain + (scale + 1) * (logits - plain), logits)
        chosen = choose_tokens(logits, columns[rows], special, not model.blocks_from_prompt_end)
        tokens.append(chosen[0])
        confidence.append(chosen[1])
        entropies.append(entropy(logits))
        for kind in {kinds[i] for i in owner[rows]} - {None}:
            assert kind is not None
            mine = np.flatnonzero([kinds[i] == kind for i in owner[rows]])
            index = torch.from_numpy(mine).to(hidden.device)
            a, d = kind.state(logits[index], model.embedding.weight)
            alpha[start + index], delta[start + index] = a.to(alpha.dtype), d.to(delta.dtype)
    # One copy to the host per pass: policies and canvases live there.
    on_host = [torch.cat(part).cpu().numpy() for part in (tokens, confidence, entropies)]
    ends = np.cumsum(counts)
    parts = [slice(int(e) - n, int(e)) for e, n in zip(ends, counts, strict=True)]
    commits = _select(model, sequences, reached, [on_host[1][p] for p in parts], [on_host[2][p] for p in parts])
    return [
        Prediction(on_host[0][p], on_host[1][p], on_host[2][p], commit, (alpha[p], delta[p]) if kind else None)
        for p, commit, kind in zip(parts, commits, kinds, strict=True)
    ]


def dirichlet(model: DiffusionModel, s: Sequence, positions: Positions) -> DenseSignals:
    """p ~ Dirichlet(1, ..., 1) at each position: normalised exponentials, keyed by seed and position (start)."""
    draws = [uniforms(hash_key("dirichlet", s.settings.seed or 0, int(p)), model.vocab_size) for p in positions]
    exponentials = -np.log1p(-np.stack(draws))
    logits = torch.from_numpy(np.log(np.maximum(exponentials, 1e-30))).float().to(model.device)
    return DenseSignals(logits, **temperatures(s.settings))


def _sampling_columns(model: DiffusionModel, sequences: list[Sequence], reached: list[Positions]) -> SamplingColumns:
    counts = [len(p) for p in reached]
    uniform = np.zeros(sum(counts))
    offset = 0
    for s, positions in zip(sequences, reached, strict=True):
        if s.settings.temperature > 0:
            drawn = [uniforms(hash_key(s.settings.seed or 0, int(p), s.step), 1)[0] for p in positions]
            uniform[offset : offset + len(positions)] = drawn
        offset += len(positions)

    def column(values: Iterable[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(np.repeat(list(values), counts), dtype=dtype, device=model.device)

    flags = {
        "filtered": (s.settings.filtered_confidence for s in sequences),
        "no_eos": (s.settings.logits_eos_inf for s in sequences),
        "eos_last": (s.settings.confidence_eos_eot_inf for s in sequences),
    }
    return SamplingColumns(
        temperature=column((s.settings.temperature for s in sequences), torch.float32),
        top_k=column((s.settings.top_k or model.vocab_size for s in sequences), torch.int64),
        top_p=column((s.settings.top_p or 1.0 for s in sequences), torch.float32),
        uniform=torch.from_numpy(uniform).to(model.device),
        **{name: column(values, torch.bool) for name, values in flags.items()},
    )


def _select(
    model: DiffusionModel,
    sequences: list[Sequence],
    reached: list[Positions],
    confidence: list[NDArray[np.float32]],
    entropies: list[NDArray[np.float32]],
) -> list[NDArray[np.bool_]]:
    """Per request a (n,) choice among its reached positions inside its block, by its own policy."""
    shape = (len(sequences), max(s.block[1] - s.block[0] for s in sequences))
    masked = np.zeros(shape, dtype=bool)
    grids = np.zeros((3, *shape))
    inside = [p < s.block[1] for s, p in zip(sequences, reached, strict=True)]
    offsets = [p[i] - s.block[0] for s, p, i in zip(sequences, reached, inside, strict=True)]
    for row, at in enumerate(offsets):
        masked[row, at] = True
        grids[0, row, at] = confidence[row][inside[row]]
        grids[1, row, at] = entropies[row][inside[row]]
        if sequences[row].settings.policy == "random":
            grids[2, row, at] = [_lot(sequences[row], int(p)) for p in reached[row][inside[row]]]
    chosen = np.zeros(shape, dtype=bool)
    quota = np.array([s.quota() for s in sequences])
    threshold = np.array([s.settings.confidence_threshold for s in sequences])
    bound = np.array([s.settings.entropy_bound or 0.0 for s in sequences])
    for policy in {s.settings.policy for s in sequences}:
        mine = np.array([s.settings.policy == policy for s in sequences])
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
    commits = [np.zeros(len(p), dtype=bool) for p in reached]
    for row, at in enumerate(offsets):
        commits[row][inside[row]] = chosen[row, at]
    return commits


def _lot(s: Sequence, position: int) -> float:
    return float(uniforms(hash_key("lot", s.settings.seed or 0, position, s.step), 1)[0])
