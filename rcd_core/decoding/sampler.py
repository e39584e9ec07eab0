"""From final hidden states to tokens, confidences, the next residuals and the commit decision.

The head runs in tiles over masked positions. Each tile of logits is reduced at once to (token, confidence, entropy)
and, for requests with residuals, (alpha, delta), so no (N, V) tensor is ever held. Drawing inverts the running sum of
the probabilities at one uniform number per position, keyed by (seed, position, pass): a draw does not depend on the
batch.

Shapes: N masked positions of all requests, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.decoding.policies import POLICIES, BlockView
from rcd_core.decoding.residual_state import ResidualState
from rcd_core.decoding.sequence import MaskedPositions, Sequence
from rcd_core.families.base import DiffusionModel
from rcd_core.noise import hash_key, uniforms
from rcd_core.ops.reduce import Feedback, Table, reduce_greedy
from rcd_core.precision import at_least_fp32

TILE_BYTES = 64 << 20  # fp32 logits of one tile


class Sampler:
    """Head and reduction of one model. The next residuals go into `state`."""

    def __init__(self, model: DiffusionModel, state: ResidualState) -> None:
        self.model, self.state = model, state
        self.table = Table(model.embedding.weight, model.learned_alpha)
        self.tile_rows = max(1, TILE_BYTES // (4 * model.vocab_size))

    def greedy(self, hidden: Tensor, state_rows: Tensor, feedback: Feedback | None, with_entropy: bool) -> Tensor:
        """(N, D) hidden states, (N,) rows of the residual state -> (3, N) fp32: tokens, confidence, entropy.

        For requests that all decode greedily with the same feedback. No host synchronisation.
        """
        tiles = zip(torch.split(hidden, self.tile_rows), torch.split(state_rows, self.tile_rows), strict=True)
        parts = [self._reduce(self._logits(h), rows, feedback, with_entropy) for h, rows in tiles]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def mixed(
        self, masked: MaskedPositions, hidden: Tensor, state_rows: Tensor, unconditional: Tensor | None
    ) -> Tensor:
        """The same for requests of any settings. unconditional (N, D): the pass without the prompt, for guidance."""
        columns, device = _sampling_columns(self.model, masked), hidden.device
        guidance = torch.from_numpy(masked.per_request(lambda s: s.settings.cfg_scale)).float().to(device)
        special = SpecialTokens(self.model.mask_token_id, self.model.info.eos_token_ids, self.model.info.end_token_ids)
        result = torch.empty(3, len(hidden), device=device)
        feedbacks = [s.feedback for s in masked.sequences]
        for feedback in dict.fromkeys(feedbacks):
            group = np.flatnonzero(np.array([f == feedback for f in feedbacks])[masked.owner])
            for rows in torch.split(torch.from_numpy(group).to(device), self.tile_rows):
                logits = self._logits(hidden[rows])
                if unconditional is not None:
                    scale, plain = guidance[rows, None], self._logits(unconditional[rows])
                    # Without guidance (scale 0) this formula would still change the logits by rounding.
                    logits = torch.where(scale > 0, plain + (scale + 1) * (logits - plain), logits)
                tokens, confidence = choose_tokens(
                    logits, columns[rows], special, not self.model.blocks_from_prompt_end
                )
                result[:, rows] = self._reduce(logits, state_rows[rows], feedback)
                result[0, rows], result[1, rows] = tokens.float(), confidence.float()
        return result

    def _reduce(
        self, logits: Tensor, state_rows: Tensor, feedback: Feedback | None, with_entropy: bool = True
    ) -> Tensor:
        reduced = reduce_greedy(logits, self.model.mask_token_id, feedback, self.table, with_entropy)
        if reduced.alpha is not None and reduced.delta is not None:
            self.state.write(state_rows, reduced.alpha, reduced.delta)
        # fp32 holds token ids exactly up to 2^24.
        return torch.stack([reduced.tokens.float(), reduced.confidence.float(), reduced.entropy.float()])

    def _logits(self, hidden: Tensor) -> Tensor:
        return at_least_fp32(self.model.head(hidden))


def choose_commits(
    model: DiffusionModel, masked: MaskedPositions, confidence: NDArray[np.float32], entropy: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """(N,) bool: the positions that are committed, chosen in each request's block by the request's policy."""
    sequences, owner = masked.sequences, masked.owner
    starts, ends = np.array([s.block for s in sequences]).T
    inside = masked.positions < ends[owner] if any(s.wide for s in sequences) else slice(None)
    shape = (len(sequences), int((ends - starts).max()))
    cells = (owner * shape[1] + masked.positions - starts[owner])[inside]  # in the flattened grids below
    is_masked = np.zeros(shape, dtype=bool)
    is_masked.ravel()[cells] = True
    grids = np.zeros((3, *shape))
    grids[0].ravel()[cells] = confidence[inside]
    policies = [s.settings.policy for s in sequences]
    if "entropy_bounded" in policies:
        grids[1].ravel()[cells] = entropy[inside]
    if "random" in policies:
        grids[2].ravel()[cells] = _keyed_uniforms(masked, lambda s: s.settings.policy == "random", "lot")[inside]
    quota = np.array([s.quota() for s in sequences])
    threshold = np.array([s.settings.confidence_threshold for s in sequences])
    bound = np.array([s.settings.entropy_bound or 0.0 for s in sequences])
    chosen = np.zeros(shape, dtype=bool)
    for policy in set(policies):
        group = np.array([p == policy for p in policies])
        view = BlockView(
            masked=is_masked[group],
            confidence=grids[0, group],
            entropy=grids[1, group],
            random_score=grids[2, group],
            quota=quota[group],
            threshold=threshold[group],
            bound=bound[group],
            inclusive=model.threshold_inclusive,
        )
        chosen[group] = POLICIES[policy](view)
    commit = np.zeros(len(owner), dtype=bool)
    commit[inside] = chosen.ravel()[cells]
    return commit


def _keyed_uniforms(masked: MaskedPositions, needs: Callable[[Sequence], bool], *key: str) -> NDArray[np.float64]:
    """(N,) numbers in [0, 1), each a function of (key, seed, position, pass); 0 for requests that do not need one."""
    result = np.zeros(len(masked.positions))
    for s, part in zip(masked.sequences, masked.slices(), strict=True):
        if needs(s):
            positions = masked.positions[part].tolist()
            result[part] = [uniforms(hash_key(*key, s.settings.seed, p, s.step), 1)[0] for p in positions]
    return result


def _sampling_columns(model: DiffusionModel, masked: MaskedPositions) -> SamplingColumns:
    uniform = _keyed_uniforms(masked, lambda s: s.settings.temperature > 0)

    def column(value: Callable[[Sequence], float], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(masked.per_request(value)).to(dtype).to(model.device)

    return SamplingColumns(
        temperature=column(lambda s: s.settings.temperature, torch.float32),
        top_k=column(lambda s: s.settings.top_k or model.vocab_size, torch.int64),
        top_p=column(lambda s: s.settings.top_p or 1.0, torch.float32),
        uniform=torch.from_numpy(uniform).to(model.device),
        filtered=column(lambda s: s.settings.filtered_confidence, torch.bool),
        no_eos=column(lambda s: s.settings.logits_eos_inf, torch.bool),
        eos_last=column(lambda s: s.settings.confidence_eos_eot_inf, torch.bool),
    )


@dataclass(frozen=True)
class SamplingColumns:
    """Settings per position, all (N,): temperature, 0 = argmax; top_k, V = off; top_p, 1 = off; uniform in [0, 1);
    filtered (bool): confidence after top-k and top-p; no_eos, eos_last (bool): LLaDA's two EOS options."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    uniform: Tensor
    filtered: Tensor
    no_eos: Tensor
    eos_last: Tensor

    def __getitem__(self, index: slice | Tensor) -> SamplingColumns:
        return SamplingColumns(*(getattr(self, f.name)[index] for f in fields(self)))


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids. mask: never chosen. eos: for logits_eos_inf. ends (eos, ends of turn): for confidence_eos_eot_inf."""

    mask: int
    eos: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()


def filtered_probabilities(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """(N, V) logits -> (N, V) the distribution that tokens are drawn from, as SDAR's generate.py has it: temperature,
    then top-k (keep >= the k-th value), then top-p (drop a token if the mass before it already exceeds p)."""
    scaled = logits / temperature[:, None]
    vocab_size = logits.shape[1]
    if bool((top_k < vocab_size).any()):
        kth = scaled.sort(-1, descending=True).values.gather(1, top_k.clamp(max=vocab_size)[:, None] - 1)
        scaled = scaled.masked_fill(scaled < kth, float("-inf"))
    if bool((top_p < 1.0).any()):
        probs, order = torch.softmax(scaled, dim=-1).sort(-1, descending=True)
        drop = probs.cumsum(-1) - probs > top_p[:, None]
        scaled = scaled.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))
    return torch.softmax(scaled, dim=-1)


def choose_tokens(
    logits: Tensor, columns: SamplingColumns, special: SpecialTokens, tempered_confidence: bool
) -> tuple[Tensor, Tensor]:
    """(N, V) logits, fp32 or wider -> (tokens (N,), confidence (N,)). The mask token is never chosen.

    Confidence is the token's probability in the full softmax: before top-k and top-p (unless `filtered`), at the
    sampling temperature if `tempered_confidence` (SDAR's evaluation code), else at temperature 1 (LLaDA). With eos_last
    the softmax leaves out ends of sequence and turn, which get confidence 0. That is LLaDA's code at temperature 0;
    above 0 its code spares EOS because of an aliasing bug, which is not reproduced here.
    """
    logits = _without(logits, special.eos, columns.no_eos)
    allowed = logits.clone()
    allowed[:, special.mask] = float("-inf")
    tokens = allowed.argmax(-1)
    drawn = (columns.temperature > 0).nonzero().flatten()
    divisor = torch.ones_like(columns.temperature)
    filtered = torch.zeros_like(columns.temperature, dtype=logits.dtype)
    if len(drawn):
        c = columns[drawn]
        probs = filtered_probabilities(allowed[drawn], c.temperature, c.top_k, c.top_p)
        cdf = probs.double().cumsum(-1)
        target = c.uniform.double() * cdf[:, -1]
        # right=True: the first index whose running sum exceeds the target, so never a token of probability 0.
        picked = torch.searchsorted(cdf, target[:, None], right=True).flatten()
        tokens[drawn] = picked.clamp(max=logits.shape[1] - 1)
        filtered[drawn] = probs.gather(1, tokens[drawn][:, None]).squeeze(1)
        if tempered_confidence:
            divisor[drawn] = c.temperature
    logp = torch.log_softmax(_without(logits, special.ends, columns.eos_last) / divisor[:, None], dim=-1)
    confidence = logp.gather(1, tokens[:, None]).squeeze(1).exp()
    return tokens, torch.where(columns.filtered, filtered, confidence)


def _without(logits: Tensor, ids: tuple[int, ...], rows: Tensor) -> Tensor:
    """Logits with `ids` at -inf in the rows where `rows` (N,) is True."""
    if not ids or not bool(rows.any()):
        return logits
    dropped = torch.zeros_like(logits, dtype=torch.bool)
    dropped[:, list(ids)] = rows[:, None]
    return logits.masked_fill(dropped, float("-inf"))
