"""What the predictions that a pass discards were worth, by observers of real decoding.

Discarded: the paper's Fig. 2 for any model: how often the token that a position gets in the end was already among the k
most probable ones of a prediction that was thrown away.
Agreement: how well the proxy residuals of decoding match the real ones of training. At each pass the target's own
prediction, which becomes the next residual, is compared with the reference's on the very same partly decoded input;
staleness compares a residual with the prediction that the same target makes one pass later.

Shapes: N discarded predictions of a step, K largest entries, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.alpha import entropy, position_rule
from rcd_core.calibration.distance import NUM_SHARES, share_bins
from rcd_core.decoding.observer import Observed
from rcd_core.decoding.reference import LocalReference
from rcd_core.decoding.sequence import Sequence
from rcd_core.families.base import DiffusionModel
from rcd_core.signals import DenseSignals

TOP_KS = (1, 2, 5, 10, 20)
ENTROPY_EDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # nats; the last bin is open
_LOGITS_BYTES = 256 << 20  # fp32 logits of a step that Agreement holds, several times
_TILE_BYTES = 64 << 20


class Discarded:
    """Counts, by progress of denoising, in which of the TOP_KS the final token already was."""

    def __init__(self, model: DiffusionModel, ks: Many[int] = TOP_KS) -> None:
        self.model, self.ks = model, [k for k in ks if k < model.vocab_size]
        self._seen: list[tuple[list[Sequence], NDArray[np.int64], NDArray[np.int64], Any, NDArray[np.int32]]] = []

    def __call__(self, seen: Observed) -> None:
        of = ~seen.committed
        rows = seen.hidden[torch.from_numpy(of).to(seen.hidden.device)]
        if len(rows):
            r = seen.masked
            self._seen.append((r.sequences, r.owner[of], r.positions[of], seen.masked_share[of], self._top(rows)))

    def _top(self, hidden: Tensor) -> NDArray[np.int32]:
        """(N, K) ids, most probable first; never the mask, which nothing commits."""
        found = []
        for part in torch.split(hidden, max(1, _TILE_BYTES // (4 * self.model.vocab_size))):
            logits = self.model.head(part).float()
            logits[:, self.model.mask_token_id] = -torch.inf
            found.append(logits.topk(self.ks[-1], -1).indices.to(torch.int32))
        return torch.cat(found).cpu().numpy()

    def report(self) -> dict[str, Any]:
        """After decoding. share: k -> for each bin of progress (share of the block's tokens committed before the pass)
        the share of discarded predictions whose k most probable tokens hold the final one, None where there are none.
        """
        counts = np.zeros(NUM_SHARES, dtype=np.int64)
        hits = np.zeros((len(self.ks), NUM_SHARES), dtype=np.int64)
        for sequences, owner, positions, shares, top in self._seen:
            final = np.array([sequences[o].canvas[p] for o, p in zip(owner.tolist(), positions.tolist(), strict=True)])
            bins = progress_bins(shares)
            counts += np.bincount(bins, minlength=NUM_SHARES)
            equal = top == final[:, None]
            for i, k in enumerate(self.ks):
                hits[i] += np.bincount(bins[equal[:, :k].any(1)], minlength=NUM_SHARES)
        per_k = {str(k): _ratios(hits[i], counts) for i, k in enumerate(self.ks)}
        overall = {str(k): _ratios(hits[i].sum(), counts.sum()) for i, k in enumerate(self.ks)}
        return {"progress_edges": _edges(), "predictions": counts.tolist(), "share": per_k, "overall": overall}


class Agreement:
    """Divergences between residual distributions (at T = 1, as delta has them), in nats, and both sides' mean alpha."""

    def __init__(self, target: DiffusionModel, reference: DiffusionModel | None) -> None:
        self.target = target
        self.reference = LocalReference(reference) if reference is not None else None
        self.max_batch = max(1, _LOGITS_BYTES // (4 * target.vocab_size * target.info.block_length))
        self._last: dict[int, tuple[NDArray[np.int64], Tensor]] = {}  # by id of the request: open positions, log p
        self._pairs: list[dict[str, NDArray[Any]]] = []
        self._stale: list[dict[str, NDArray[Any]]] = []

    def __call__(self, seen: Observed) -> None:
        logp = torch.log_softmax(self.target.head(seen.hidden).float(), -1)
        shares, ends = seen.masked_share, seen.masked.ends.tolist()
        last: dict[int, tuple[NDArray[np.int64], Tensor]] = {}
        for s, start, end in zip(seen.masked.sequences, [0, *ends[:-1]], ends, strict=True):
            positions = seen.masked.positions[start:end]
            self._compare_with_last(s, positions, logp[start:end], shares[start:end])
            left = np.flatnonzero(~seen.committed[start:end])
            last[id(s)] = (positions[left], logp[start:end][torch.from_numpy(left).to(logp.device)])
        self._last = last
        of = ~seen.committed
        if self.reference is not None and of.any():
            answers = [
                a.logits for a in self.reference.signals(seen.reference_requests(of)) if isinstance(a, DenseSignals)
            ]
            own = logp[torch.from_numpy(of).to(logp.device)]
            self._compare(torch.cat(answers).to(own.device), own, shares[of], seen.masked.sequences[0])

    def _compare_with_last(
        self, s: Sequence, positions: NDArray[np.int64], logp: Tensor, shares: NDArray[np.float64]
    ) -> None:
        before, stale = self._last.get(id(s), (None, None))
        if before is None or stale is None:
            return
        _, now, then = np.intersect1d(positions, before, assume_unique=True, return_indices=True)
        if len(now):
            fresh = logp[torch.from_numpy(now).to(logp.device)]
            stale = stale[torch.from_numpy(then).to(logp.device)]
            self._stale.append({"shares": shares[now], **_divergences(fresh, stale, "fresh", "stale")})

    def _compare(self, real: Tensor, own: Tensor, shares: NDArray[np.float64], s: Sequence) -> None:
        rule, scale = position_rule(s.settings), s.settings.alpha_scale
        t_res = s.settings.residual_temperature

        def alpha(logits: Tensor, temperature: float) -> NDArray[Any]:
            signals = DenseSignals(logits, temperature)
            return _numpy(signals.alpha(logits.shape[1], rule, scale, learned=self.target.learned_alpha))

        self._pairs.append(
            {
                "shares": shares,
                "entropy": _numpy(entropy(real)),
                **_divergences(torch.log_softmax(real, -1), own, "reference", "self"),
                "same_top1": _numpy((real.argmax(-1) == own.argmax(-1)).float()),
                "alpha_reference": alpha(real, 1.0),
                "alpha_self": alpha(own, t_res),
            }
        )

    def report(self) -> dict[str, Any]:
        """staleness by progress; with a reference, agreement by entropy of the reference's prediction and by progress.
        Each: edges, positions of each bin, and means (None where a bin is empty)."""
        found: dict[str, Any] = {}
        if self._stale:
            columns = _joined(self._stale)
            bins = progress_bins(columns.pop("shares"))
            found["staleness"] = {"edges": _edges(), **_means(columns, bins, NUM_SHARES)}
        if self._pairs:
            columns = _joined(self._pairs)
            shares, entropies = columns.pop("shares"), columns.pop("entropy")
            by_entropy = np.digitize(entropies, ENTROPY_EDGES) - 1
            overall = _means(columns, np.zeros(len(shares), dtype=np.int64), 1)
            found["agreement"] = {
                "by_entropy": {"edges": list(ENTROPY_EDGES), **_means(columns, by_entropy, len(ENTROPY_EDGES))},
                "by_progress": {"edges": _edges(), **_means(columns, progress_bins(shares), NUM_SHARES)},
                "overall": {name: values[0] for name, values in overall.items()},
            }
        return found


def progress_bins(masked_shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """(N,) masking ratios -> bins of progress, from 0, nothing committed yet."""
    return NUM_SHARES - 1 - share_bins(masked_shares)


def _divergences(a: Tensor, b: Tensor, name_a: str, name_b: str) -> dict[str, NDArray[Any]]:
    """(N, V) log-probabilities -> both KL divergences and Jensen-Shannon's, (N,) each in nats."""
    p, q = a.exp(), b.exp()
    middle = torch.log((p + q) / 2)
    middle = torch.where(torch.isfinite(middle), middle, 0.0)  # both 0: nothing to add up
    return {
        f"kl_{name_a}_{name_b}": _numpy((p * (a - b)).sum(-1)),
        f"kl_{name_b}_{name_a}": _numpy((q * (b - a)).sum(-1)),
        "js": _numpy(((p * (a - middle)).sum(-1) + (q * (b - middle)).sum(-1)) / 2),
    }


def _numpy(t: Tensor) -> NDArray[Any]:
    return t.cpu().numpy().astype(np.float64)


def _joined(parts: Many[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
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
