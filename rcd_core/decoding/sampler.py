"""From final hidden states to tokens, confidences, the next residuals and the commit decision.

The head runs in tiles over masked positions. Each tile of logits is reduced at once to (token, confidence, entropy)
and, for requests with residuals, (alpha, delta), so no (N, V) tensor is ever held. Positions of the same kind share a
tile. Drawing inverts the running sum of the probabilities at one uniform number per position, keyed by (seed, position,
pass): a draw does not depend on the batch.

Shapes: N masked positions of a pass, n of a tile, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.decoding.cuda_graphs import GraphCache
from rcd_core.decoding.masked_positions import MaskedPositions
from rcd_core.decoding.policies import POLICIES, BlockView
from rcd_core.decoding.residual_state import ResidualState
from rcd_core.decoding.sequence import Sequence
from rcd_core.families.base import DiffusionModel
from rcd_core.ops.random import position_keys, uniforms
from rcd_core.ops.reduce import Feedback
from rcd_core.ops.tiles import tile_rows
from rcd_core.ops.top_k import largest
from rcd_core.precision import reduction_dtype, running_sum

NUM_RESULTS = 4  # token, confidence, entropy, margin
_RANDOM, _INDEPENDENT = (list(POLICIES).index(name) for name in ("random", "independent"))
_FIXED_TILES = (32, 128, 512)  # positions of a tile of fixed shape, at most what a tile holds

Integers = NDArray[np.int64]
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Kind:
    """What the head does for a position, beside its own numbers (Draws). Positions of one kind share a tile, so no
    decision depends on a value on the device.

    drawn: temperature above 0. filtered: top_k or top_p. no_eos, eos_last: LLaDA's two EOS options. guided: classifier-
    free guidance. entropy, margin: they are needed. filtered_ranks: margin and entropy after top_k and top_p, too.
    """

    feedback: Feedback | None
    entropy: bool
    drawn: bool = False
    filtered: bool = False
    filtered_confidence: bool = False
    no_eos: bool = False
    eos_last: bool = False
    guided: bool = False
    margin: bool = False
    filtered_ranks: bool = False

    @classmethod
    def of(cls, request: Sequence) -> Kind:
        s, drawn = request.settings, request.settings.temperature > 0
        return cls(
            feedback=request.feedback,
            entropy=request.needs_entropy,
            drawn=drawn,
            filtered=(drawn or s.filtered_confidence) and (s.top_k is not None or s.top_p is not None),
            filtered_confidence=s.filtered_confidence,
            no_eos=s.logits_eos_inf,
            eos_last=s.confidence_eos_eot_inf,
            guided=s.cfg_scale > 0,
            margin=s.rank_by == "margin",
            filtered_ranks=s.filtered_confidence and s.rank_by != "confidence",
        )

    @property
    def needs_numbers(self) -> bool:
        """Whether its positions have Draws."""
        return self.drawn or self.guided or self.filtered

    @property
    def greedy(self) -> bool:
        """The most probable token with its probability in the whole prediction."""
        return not (self.drawn or self.no_eos or self.eos_last or self.filtered_confidence)


@dataclass(frozen=True)
class Draws:
    """Numbers of positions, all (n,) fp64: temperature; top_k, V = off; top_p, 1 = off; uniform in [0, 1);
    cfg_scale."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    uniform: Tensor
    cfg_scale: Tensor


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids. mask: never chosen. eos: for logits_eos_inf. ends (eos, ends of turn): for confidence_eos_eot_inf."""

    mask: int
    eos: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()


class Sampler:
    """Head and reduction of one model. The next residuals go into `state`."""

    def __init__(self, model: DiffusionModel, state: ResidualState) -> None:
        self.model, self.state, self.vocabulary = model, state, state.vocabulary
        self.special = SpecialTokens(model.mask_token_id, model.info.eos_token_ids, model.info.end_token_ids)
        self.tile_rows = tile_rows(model.vocab_size, model.device)
        self._kinds: list[Kind] = []
        # fp32 holds token ids exactly up to 2^24.
        self.dtype = reduction_dtype(model.dtype)

    def kind_of(self, request: Sequence) -> int:
        """The number of the request's kind, for Sequence.kind."""
        kind = Kind.of(request)
        if kind not in self._kinds:
            self._kinds.append(kind)
        return self._kinds.index(kind)

    def predict(
        self,
        masked: MaskedPositions,
        part: slice,
        hidden: Tensor,
        index: Integers,
        unconditional: Tensor | None,
        results: Tensor,
        graphs: GraphCache | None,
    ) -> None:
        """Predict masked.positions[part] (n,) from rows `index` (n,) of hidden (T, D), into columns `part` of results
        (NUM_RESULTS, N): token, confidence, entropy, margin. unconditional (T, D): the pass without the prompt. graphs:
        run in tiles of fixed shape; hidden must be the same tensor in every call then."""
        of_blocks = [block.sequence.kind for block in masked.blocks]
        present = [(number, self._kinds[number]) for number in sorted(set(of_blocks))]
        kinds = np.array(of_blocks)[masked.owner[part]] if len(present) > 1 else None
        packed = np.empty((3, len(index)), dtype=np.int64)
        packed[0], packed[1], packed[2] = index, self.state.rows_of(masked)[part], np.arange(part.start, part.stop)
        numbers = None
        if any(kind.needs_numbers for _, kind in present):
            numbers = _numbers(self.model, masked, part).view(np.int64)
        for number, kind in present:
            of_kind: Any = slice(None) if kinds is None else kinds == number
            integers = packed[:, of_kind]
            if numbers is not None and kind.needs_numbers:  # a tile of a kind always has the same shape
                integers = np.concatenate([integers, numbers[:, of_kind]])
            # The pass without the prompt is a new tensor each time, which a captured tile would not find.
            self._tiles(kind, integers, hidden, unconditional, results, None if kind.guided else graphs)

    def _tiles(
        self,
        kind: Kind,
        integers: Integers,
        hidden: Tensor,
        unconditional: Tensor | None,
        results: Tensor,
        graphs: GraphCache | None,
    ) -> None:
        count = integers.shape[1]
        if graphs is None:
            device = torch.from_numpy(np.ascontiguousarray(integers)).to(hidden.device)
            for at in range(0, count, self.tile_rows):
                some = device[:, at : at + self.tile_rows]
                result = self._tile(kind, some, hidden, unconditional)
                results[: len(result)].index_copy_(1, some[2], result)
            return
        sizes = [min(size, self.tile_rows) for size in _FIXED_TILES]
        at = 0
        while at < count:
            size = next((s for s in sizes if s >= count - at), sizes[-1])
            tile = integers[:, at : at + size]
            real = tile.shape[1]
            fixed = np.zeros((len(integers), size), dtype=np.int64)
            fixed[:, :real] = tile
            fixed[:, real:] = tile[:, :1]  # the extra ones repeat a position
            fixed[1, real:] = self.state.discard_row
            warmup = fixed.copy()
            warmup[1] = self.state.discard_row

            def run(device: Tensor, size: int = size) -> Tensor:
                return self._tile(kind, device.view(-1, size), hidden, unconditional)

            result = graphs(("head", kind, size), fixed.ravel(), warmup.ravel(), run)
            columns = torch.from_numpy(np.ascontiguousarray(tile[2])).to(results.device)
            results[: len(result), columns] = result[:, :real]
            at += size

    def _tile(self, kind: Kind, integers: Tensor, hidden: Tensor, unconditional: Tensor | None) -> Tensor:
        """(3 + 5, n) integers: rows of hidden, rows of the state, columns of the result, Draws' bits
        -> (NUM_RESULTS, n), or without the last if not needed. No host synchronisation."""
        rows, state_rows = integers[0], integers[1]
        draws = Draws(*integers[3:].view(torch.float64)) if len(integers) > 3 else None
        logits = self._logits(hidden.index_select(0, rows))
        if kind.guided and draws is not None and unconditional is not None:
            plain = self._logits(unconditional.index_select(0, rows))
            logits = plain + (draws.cfg_scale.to(logits.dtype)[:, None] + 1) * (logits - plain)
        reduced = self.vocabulary.reduce(logits, kind.feedback, kind.entropy)
        if reduced.alpha is not None and reduced.delta is not None:
            self.state.write(state_rows, reduced.alpha, reduced.delta)
        tokens, confidence, entropy = reduced.tokens, reduced.confidence, reduced.entropy
        if not kind.greedy:
            tempered = not self.model.blocks_from_prompt_end
            tokens, confidence = choose_tokens(self.vocabulary.whole(logits), kind, draws, self.special, tempered)
        ranked = None
        if kind.margin or kind.filtered_ranks:
            whole = self.vocabulary.whole(logits)
            ranked = _filtered(whole, kind, draws) if kind.filtered_ranks else torch.softmax(whole, -1)
            if kind.filtered_ranks:
                entropy = -torch.special.xlogy(ranked, ranked).sum(-1)
        results = [tokens, confidence, entropy]
        if kind.margin and ranked is not None:
            first, second = ranked.topk(2, -1).values.T
            results.append(first - second)
        return torch.stack([result.to(self.dtype) for result in results])

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.vocabulary.logits(hidden).to(self.dtype)


def _numbers(model: DiffusionModel, masked: MaskedPositions, part: slice) -> NDArray[np.float64]:
    """(5, n) the positions' Draws."""
    owner = masked.owner[part]
    settings = [b.settings for b in masked.blocks]
    values = [(s.temperature, s.top_k or model.vocab_size, s.top_p or 1.0, 0.0, s.cfg_scale) for s in settings]
    numbers = np.array(values, dtype=np.float64).T[:, owner]
    numbers[3] = _keyed_uniforms(masked, "draw")[part]
    return numbers


def _keyed_uniforms(masked: MaskedPositions, purpose: str) -> NDArray[np.float64]:
    """(N,) numbers in [0, 1), each a function of (purpose, seed, position, pass)."""
    of_blocks = np.array([(b.settings.seed, b.step) for b in masked.blocks], dtype=np.int64)
    seeds, steps = of_blocks[masked.owner].T
    return uniforms(position_keys(purpose, seeds, masked.positions, steps))


def choose_commits(masked: MaskedPositions, confidence: Floats, entropy: Floats, margin: Floats) -> NDArray[np.bool_]:
    """(N,) bool: the positions that are committed, chosen in each block by its request's policy."""
    blocks, owner = masked.blocks, masked.owner
    numbers = np.fromiter(chain.from_iterable([b.numbers for b in blocks]), np.float64).reshape(len(blocks), -1)
    quota = np.array([b.quota() for b in blocks])
    starts, ends = numbers[:, :2].astype(np.int64).T
    threshold, inclusive, bound, policy_of, rank_of = numbers[:, 2:].T
    inside: Any = masked.positions < ends[owner] if any(b.sequence.wide for b in blocks) else slice(None)
    if masked.filled is not None:
        inside = (masked.positions < ends[owner]) & ~masked.filled
    shape = (len(blocks), max([int(b.numbers[1] - b.numbers[0]) for b in blocks]))
    cells = (owner * shape[1] + masked.positions - starts[owner])[inside]  # in the flattened grids below
    is_masked = np.zeros(shape, dtype=bool)
    is_masked.ravel()[cells] = True
    grids = np.zeros((4, *shape))
    grids[0].ravel()[cells] = confidence[inside]
    names = list(POLICIES)
    used = set(policy_of.tolist())
    policies: dict[str, Any] = {names[int(n)]: policy_of == n if len(used) > 1 else slice(None) for n in used}
    if "entropy_bounded" in policies:
        grids[1].ravel()[cells] = entropy[inside]
    share = np.array([b.share() for b in blocks]) if "independent" in policies else np.zeros(len(blocks))
    if used & {_RANDOM, _INDEPENDENT}:
        grids[2].ravel()[cells] = _keyed_uniforms(masked, "lot")[inside]
    grids[3] = grids[0]
    for number, rank in enumerate((confidence, -entropy, margin)) if rank_of.any() else ():  # in the order of RankBy
        of_rank = (rank_of == number)[owner][inside]
        grids[3].ravel()[cells[of_rank]] = rank[inside][of_rank]
    chosen = np.zeros(shape, dtype=bool)
    for policy, group in policies.items():
        view = BlockView(
            masked=is_masked[group],
            confidence=grids[0, group],
            entropy=grids[1, group],
            rank=grids[3, group],
            random_score=grids[2, group],
            quota=quota[group],
            share=share[group],
            threshold=threshold[group],
            bound=bound[group],
            inclusive=inclusive[group] > 0,
        )
        chosen[group] = POLICIES[policy](view)
    commit = np.zeros(len(owner), dtype=bool)
    commit[inside] = chosen.ravel()[cells]
    return commit


def filtered_probabilities(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """(N, V) logits -> (N, V) the distribution that tokens are drawn from, as SDAR's generate.py has it: temperature,
    then top-k (keep >= the k-th value; V keeps all), then top-p (drop a token if the mass before it already exceeds p;
    1 keeps all)."""
    scaled = logits / temperature[:, None]
    ordered, order = scaled.sort(-1, descending=True)
    kth = ordered.gather(1, top_k.long().clamp(max=logits.shape[1])[:, None] - 1)
    ordered = ordered.masked_fill(ordered < kth, float("-inf"))
    probs = torch.softmax(ordered, dim=-1)
    drop = (running_sum(probs) - probs > top_p[:, None]) & (top_p < 1.0)[:, None]
    probs = torch.softmax(ordered.masked_fill(drop, float("-inf")), dim=-1)
    return torch.zeros_like(probs).scatter(1, order, probs)


def _filtered(logits: Tensor, kind: Kind, draws: Draws | None) -> Tensor:
    """(N, V) the distribution after temperature (1 where nothing is drawn), top-k and top-p."""
    if draws is None:
        return torch.softmax(logits, -1)
    temperature = draws.temperature.to(logits.dtype) if kind.drawn else logits.new_ones(len(logits))
    return filtered_probabilities(logits, temperature, draws.top_k, draws.top_p.to(logits.dtype))


def choose_tokens(
    logits: Tensor, kind: Kind, draws: Draws | None, special: SpecialTokens, tempered_confidence: bool
) -> tuple[Tensor, Tensor]:
    """(N, V) logits -> (tokens (N,), confidence (N,)). The mask token is never chosen.

    Confidence is the token's probability in the full softmax: before top-k and top-p (unless `filtered_confidence`), at
    the sampling temperature if `tempered_confidence` (SDAR's evaluation code), else at temperature 1 (LLaDA). With
    eos_last the softmax leaves out ends of sequence and turn, which get confidence 0. That is LLaDA's code at
    temperature 0; above 0 its code spares EOS because of an aliasing bug, which is not reproduced here.
    """
    if kind.no_eos:
        logits = _without(logits, special.eos)
    allowed = _without(logits, (special.mask,))
    rest = _without(logits, special.ends) if kind.eos_last else logits
    if not kind.drawn or draws is None:
        _, tokens = largest(allowed)
        if kind.filtered_confidence:
            return tokens, _filtered(logits, kind, draws).gather(1, tokens[:, None])[:, 0]
        return tokens, torch.log_softmax(rest, dim=-1).gather(1, tokens[:, None])[:, 0].exp()
    temperature = draws.temperature.to(logits.dtype)
    if kind.filtered:
        probs = filtered_probabilities(allowed, temperature, draws.top_k, draws.top_p.to(logits.dtype))
    else:
        probs = torch.softmax(allowed / temperature[:, None], dim=-1)
    cdf = running_sum(probs.double())
    target = draws.uniform * cdf[:, -1]
    # right=True: the first index whose running sum exceeds the target, so never a token of probability 0.
    tokens = torch.searchsorted(cdf, target[:, None], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    if kind.filtered_confidence:
        return tokens, probs.gather(1, tokens[:, None])[:, 0]
    if tempered_confidence:
        rest = rest / temperature[:, None]
    return tokens, torch.log_softmax(rest, dim=-1).gather(1, tokens[:, None])[:, 0].exp()


def _without(logits: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Logits with `ids` at -inf."""
    logits = logits.clone()
    for token in ids:
        logits[:, token] = float("-inf")
    return logits
