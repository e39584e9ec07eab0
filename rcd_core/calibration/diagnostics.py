"""Observers that measure the information in discarded predictions of real decoding.

Discarded: the paper's Fig. 2 for any model: how often a position's final token was already among the k most probable
tokens of a discarded prediction.
Agreement: how well the residuals of decoding match those of training. After each pass the target's prediction, which
becomes the next residual, is compared with the reference's on the same partly decoded input. Staleness compares a
residual with the same target's prediction one pass later.

Shapes: N discarded predictions of a step, K largest entries, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.alpha import entropy, position_rule
from rcd_core.calibration.distance import NUM_SHARES, share_bins
from rcd_core.decoding.observer import Observed
from rcd_core.decoding.reference import LocalReference
from rcd_core.decoding.sequence import LiveBlock
from rcd_core.dense_signals import DenseSignals, HiddenSignals
from rcd_core.families.base import DiffusionModel

TOP_KS = (1, 2, 5, 10, 20)
ENTROPY_EDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # nats; the last bin is open
_LOGITS_BYTES = 256 << 20  # fp32 logits of a step in Agreement, which keeps several copies
_TILE_BYTES = 64 << 20


class Discarded:
    """Counts, by progress of denoising, in which top-k of a discarded prediction the final token was."""

    def __init__(self, model: DiffusionModel, ks: tuple[int, ...] = TOP_KS) -> None:
        self.model, self.ks = model, [k for k in ks if k < model.vocab_size]
        self._steps: list[tuple[list[LiveBlock], NDArray[np.int64], NDArray[np.int64], Any, NDArray[np.int32]]] = []

    def __call__(self, step: Observed) -> None:
        discarded = step.discarded
        hidden = step.hidden[torch.from_numpy(discarded).to(step.hidden.device)]
        if len(hidden):
            m, shares = step.masked, step.masked_share[discarded]
            self._steps.append((m.blocks, m.owner[discarded], m.positions[discarded], shares, self._top(hidden)))

    def _top(self, hidden: Tensor) -> NDArray[np.int32]:
        """(N, K) ids, most probable first, without the mask token, which is never committed."""
        ids = []
        for part in torch.split(hidden, max(1, _TILE_BYTES // (4 * self.model.vocab_size))):
            logits = self.model.head(part).float()
            logits[:, self.model.mask_token_id] = -torch.inf
            ids.append(logits.topk(self.ks[-1], -1).indices.to(torch.int32))
        return torch.cat(ids).cpu().numpy()

    def report(self) -> dict[str, Any]:
        """Call after decoding. share: k -> for each bin of progress (share of the block's tokens committed before the
        pass) the share of discarded predictions with the final token in their top k; None for empty bins."""
        counts = np.zeros(NUM_SHARES, dtype=np.int64)
        hits = np.zeros((len(self.ks), NUM_SHARES), dtype=np.int64)
        for blocks, owner, positions, shares, top in self._steps:
            pairs = zip(owner.tolist(), positions.tolist(), strict=True)
            final = np.array([blocks[o].sequence.canvas[p] for o, p in pairs])
            bins = progress_bins(shares)
            counts += np.bincount(bins, minlength=NUM_SHARES)
            equal = top == final[:, None]
            for i, k in enumerate(self.ks):
                hits[i] += np.bincount(bins[equal[:, :k].any(1)], minlength=NUM_SHARES)
        per_k = {str(k): _ratios(hits[i], counts) for i, k in enumerate(self.ks)}
        overall = {str(k): _ratios(hits[i].sum(), counts.sum()) for i, k in enumerate(self.ks)}
        return {"progress_edges": _edges(), "predictions": counts.tolist(), "share": per_k, "overall": overall}


class Agreement:
    """Divergences in nats between residual distributions at T = 1 (as in delta), and mean alpha of both sides."""

    def __init__(self, target: DiffusionModel, reference: DiffusionModel | None) -> None:
        self.target = target
        self.reference = LocalReference(reference) if reference is not None else None
        self.max_batch = max(1, _LOGITS_BYTES // (4 * target.vocab_size * target.info.block_length))
        self._last: dict[int, tuple[NDArray[np.int64], Tensor]] = {}  # id of the block -> masked positions, log p
        self._pairs: list[dict[str, NDArray[Any]]] = []
        self._stale: list[dict[str, NDArray[Any]]] = []

    def __call__(self, step: Observed) -> None:
        logp = torch.log_softmax(self.target.head(step.hidden).float(), -1)
        shares, discarded = step.masked_share, step.discarded
        last: dict[int, tuple[NDArray[np.int64], Tensor]] = {}
        for block, part in zip(step.masked.blocks, step.masked.slices(), strict=True):
            positions = step.masked.positions[part]
            self._compare_with_last(block, positions, logp[part], shares[part])
            kept = np.flatnonzero(discarded[part])
            last[id(block)] = (positions[kept], logp[part][torch.from_numpy(kept).to(logp.device)])
        self._last = last
        if self.reference is not None and discarded.any():
            signals = self.reference.signals(step.reference_requests(discarded))
            tiles = [tile.logits for s in signals if isinstance(s, HiddenSignals) for tile in s.tiles()]
            logits = torch.cat(tiles).to(logp.device)
            own = logp[torch.from_numpy(discarded).to(logp.device)]
            self._compare(logits, own, shares[discarded], step.masked.blocks[0])

    def _compare_with_last(
        self, block: LiveBlock, positions: NDArray[np.int64], logp: Tensor, shares: NDArray[np.float64]
    ) -> None:
        before, stale = self._last.get(id(block), (None, None))
        if before is None or stale is None:
            return
        _, index, index_before = np.intersect1d(positions, before, assume_unique=True, return_indices=True)
        if len(index):
            fresh = logp[torch.from_numpy(index).to(logp.device)]
            stale = stale[torch.from_numpy(index_before).to(logp.device)]
            self._stale.append({"shares": shares[index], **_divergences(fresh, stale, "fresh", "stale")})

    def _compare(self, reference: Tensor, own: Tensor, shares: NDArray[np.float64], block: LiveBlock) -> None:
        rule, scale = position_rule(block.settings), block.settings.alpha_scale
        t_res = block.settings.residual_temperature

        def alpha(logits: Tensor, temperature: float) -> NDArray[Any]:
            signals = DenseSignals(logits, temperature)
            return _numpy(signals.alpha(logits.shape[1], rule, scale, learned=self.target.learned_alpha))

        self._pairs.append(
            {
                "shares": shares,
                "entropy": _numpy(entropy(reference)),
                **_divergences(torch.log_softmax(reference, -1), own, "reference", "self"),
                "same_top1": _numpy((reference.argmax(-1) == own.argmax(-1)).float()),
                "alpha_reference": alpha(reference, 1.0),
                "alpha_self": alpha(own, t_res),
            }
        )

    def report(self) -> dict[str, Any]:
        """staleness by progress; with a reference also agreement, by entropy of its prediction and by progress.
        Each has edges, positions per bin, and means (None for empty bins)."""
        report: dict[str, Any] = {}
        if self._stale:
            columns = _joined(self._stale)
            bins = progress_bins(columns.pop("shares"))
            report["staleness"] = {"edges": _edges(), **_means(columns, bins, NUM_SHARES)}
        if self._pairs:
            columns = _joined(self._pairs)
            shares, entropies = columns.pop("shares"), columns.pop("entropy")
            by_entropy = np.digitize(entropies, ENTROPY_EDGES) - 1
            overall = _means(columns, np.zeros(len(shares), dtype=np.int64), 1)
            report["agreement"] = {
                "by_entropy": {"edges": list(ENTROPY_EDGES), **_means(columns, by_entropy, len(ENTROPY_EDGES))},
                "by_progress": {"edges": _edges(), **_means(columns, progress_bins(shares), NUM_SHARES)},
                "overall": {name: values[0] for name, values in overall.items()},
            }
        return report


def progress_bins(masked_shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """(N,) masking ratios -> bins of progress; bin 0: nothing committed."""
    return NUM_SHARES - 1 - share_bins(masked_shares)


def _divergences(a: Tensor, b: Tensor, name_a: str, name_b: str) -> dict[str, NDArray[Any]]:
    """(N, V) log-probabilities -> both KL divergences and the Jensen-Shannon divergence, each (N,) in nats."""
    p, q = a.exp(), b.exp()
    middle = torch.log((p + q) / 2)
    middle = torch.where(torch.isfinite(middle), middle, 0.0)  # both probabilities are 0
    return {
        f"kl_{name_a}_{name_b}": _numpy((p * (a - b)).sum(-1)),
        f"kl_{name_b}_{name_a}": _numpy((q * (b - a)).sum(-1)),
        "js": _numpy(((p * (a - middle)).sum(-1) + (q * (b - middle)).sum(-1)) / 2),
    }


def _numpy(t: Tensor) -> NDArray[Any]:
    return t.cpu().numpy().astype(np.float64)


def _joined(parts: list[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _means(columns: dict[str, NDArray[Any]], bins: NDArray[np.int64], count: int) -> dict[str, list[Any]]:
    positions = np.bincount(bins, minlength=count)
    sums = {name: np.bincount(bins, weights=values, minlength=count) for name, values in columns.items()}
    return {"positions": positions.tolist(), **{name: _ratios(total, positions) for name, total in sums.items()}}


def _ratios(totals: Any, counts: Any) -> Any:
    if np.ndim(totals) == 0:
        return round(float(totals) / int(counts), 6) if counts else None
    return [_ratios(t, n) for t, n in zip(totals.tolist(), counts.tolist(), strict=True)]


def _edges() -> list[float]:
    return [round(i / NUM_SHARES, 6) for i in range(NUM_SHARES + 1)]
