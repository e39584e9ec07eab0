"""What plain decoding throws away: candidates for a measure that says before a training whether residuals will pay.

    thrown_away = ThrownAway(model)
    for prompts in batches:
        Decoder(model, observer=thrown_away).generate(prompts, settings)     # without residuals
        thrown_away.finish()
    thrown_away.report()

A prediction is discarded if its pass leaves the position masked. y is the token that the position has at the end, p the
discarded distribution, without the mask token, and H its entropy. All values are means over discarded predictions, in
nats, unless they say otherwise:

- discarded: their number per committed token. Padding of an answer's last block counts as committed, too.
- entropy: H. surprise: -ln p(y). If predictions were calibrated, surprise would equal entropy.
- information: ln p(y) - ln m(y), with m the mean of all discarded distributions: what p says about y beyond what is
  known about any masked position.
- information_per_token: the same summed up, per committed token.
- open_information: information with each prediction weighted by H / mean H: what p says while it is still uncertain.
- forgotten: of all pairs of a discarded prediction q and the next pass's prediction p at the same position, how much
  larger ln r(y) is than ln p(y), r = softmax(ln p + w ln q), with the best weight w of WEIGHTS: what q still says about
  y that the next pass, which sees more tokens, does not. The best weight itself is `forgotten_weight`.

Shapes: N predictions of a step, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.decoding.observer import Observed
from rcd_core.decoding.sequence import LiveBlock
from rcd_core.families.base import DiffusionModel

WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
# What was measured (tests/benchmarks/evidence/README.md): information_per_token of bases, and how many times SeqD's
# tokens per pass the demo's method takes at 90 % accuracy (95 % in blocks of 8), both as the smallest and the largest.
MEASURED = (
    ("word problems in equations, blocks of 8", (0.11, 0.11), (1.00, 1.00)),
    ("word problems in equations, blocks of 32", (0.39, 0.39), (0.97, 0.97)),
    ("6x6 Sudoku in a text, three bases", (2.24, 2.65), (1.26, 1.31)),
    ("6x6 Sudoku, three bases", (4.52, 4.76), (1.36, 1.46)),
)
_LEAST_GAIN = 1.05
NO_GAIN = max(high for _, (_, high), (_, most) in MEASURED if most < _LEAST_GAIN)  # the largest value without a gain
GAIN = min(low for _, (low, _), (least, _) in MEASURED if least >= _LEAST_GAIN)  # the smallest with one
_TILE_BYTES = 64 << 20


class ThrownAway:
    """An observer that sums the measures up. It keeps the hidden states of all steps until `finish`."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model = model
        self._steps: list[_Step] = []
        self._counts = torch.zeros(model.vocab_size, dtype=torch.float64)  # of y
        self._weighted_counts = torch.zeros_like(self._counts)  # with weight H
        self._mass = torch.zeros_like(self._counts)  # sum of p
        self._gains = torch.zeros(len(WEIGHTS), dtype=torch.float64)  # sums of ln r(y) - ln p(y)
        self._totals = dict.fromkeys(("predictions", "pairs", "tokens", "entropy", "log_p", "weighted_log_p"), 0.0)

    def __call__(self, step: Observed) -> None:
        m = step.masked
        blocks = np.array([id(b) for b in m.blocks])[m.owner]
        self._steps.append(_Step(m.blocks, m.owner, blocks, m.positions, step.discarded, step.hidden.clone()))
        self._totals["tokens"] += int(step.committed.sum())

    @torch.inference_mode()
    def finish(self) -> None:
        """Call when the observed requests are complete; their final tokens are taken from the canvases."""
        last: dict[tuple[int, int], Tensor] = {}  # (block, position) -> hidden state (D,) of its discarded prediction
        rows = max(1, _TILE_BYTES // (8 * self.model.vocab_size))
        for step in self._steps:
            final = torch.from_numpy(step.final())
            keys = list(zip(step.block.tolist(), step.position.tolist(), strict=True))
            before = [i for i, key in enumerate(keys) if key in last]
            for part in np.split(np.flatnonzero(step.discarded), range(rows, int(step.discarded.sum()), rows)):
                self._add(step.hidden[part], final[part])
            for first in range(0, len(before), rows):
                pairs = before[first : first + rows]
                self._add_pairs(torch.stack([last[keys[i]] for i in pairs]), step.hidden[pairs], final[pairs])
            last |= {keys[i]: step.hidden[i] for i in np.flatnonzero(step.discarded)}
        self._steps.clear()

    def report(self) -> dict[str, Any]:
        """The measures by name; {} if nothing was discarded."""
        t = self._totals
        if not t["predictions"]:
            return {}
        log_mean = (self._mass / t["predictions"]).clamp(min=1e-300).log()
        information = (t["log_p"] - float(self._counts @ log_mean)) / t["predictions"]
        open_information = (t["weighted_log_p"] - float(self._weighted_counts @ log_mean)) / max(t["entropy"], 1e-12)
        gains = (self._gains / max(1.0, t["pairs"])).tolist()
        best = int(np.argmax(gains))
        return {
            "predictions": int(t["predictions"]),
            "discarded": t["predictions"] / max(1.0, t["tokens"]),
            "entropy": t["entropy"] / t["predictions"],
            "surprise": -t["log_p"] / t["predictions"],
            "information": information,
            "information_per_token": information * t["predictions"] / max(1.0, t["tokens"]),
            "open_information": open_information,
            "forgotten": gains[best],
            "forgotten_weight": WEIGHTS[best],
        }

    def _add(self, hidden: Tensor, final: Tensor) -> None:
        logp = self._logp(hidden)
        p = logp.exp()
        entropy = -(p * logp.clamp(min=-1e4)).sum(-1)
        of_final = logp[torch.arange(len(final)), final]
        self._totals["predictions"] += len(final)
        self._totals["entropy"] += float(entropy.sum())
        self._totals["log_p"] += float(of_final.sum())
        self._totals["weighted_log_p"] += float(entropy @ of_final)
        self._mass += p.sum(0)
        self._counts.index_add_(0, final, torch.ones_like(entropy))
        self._weighted_counts.index_add_(0, final, entropy)

    def _add_pairs(self, before: Tensor, now: Tensor, final: Tensor) -> None:
        q, p = self._logp(before), self._logp(now)
        rows = torch.arange(len(final))
        for i, weight in enumerate(WEIGHTS):
            r = torch.log_softmax(p + weight * q.clamp(min=-1e4), -1)
            self._gains[i] += float((r - p)[rows, final].sum())
        self._totals["pairs"] += len(final)

    def _logp(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V) fp64 log-probabilities on the CPU; the mask token, which is never committed, has none."""
        logits = self.model.head(hidden).double()
        logits[:, self.model.mask_token_id] = -torch.inf
        return torch.log_softmax(logits, -1).cpu()


class _Step:
    """One step's predictions: owner (N,) index into blocks, block (N,) its id, position (N,), hidden (N, D)."""

    def __init__(
        self,
        blocks: list[LiveBlock],
        owner: NDArray[np.int64],
        block: NDArray[np.int64],
        position: NDArray[np.int64],
        discarded: NDArray[np.bool_],
        hidden: Tensor,
    ) -> None:
        self.blocks, self.owner, self.block, self.position = blocks, owner, block, position
        self.discarded, self.hidden = discarded, hidden

    def final(self) -> NDArray[np.int64]:
        """(N,) tokens that the positions have now."""
        pairs = zip(self.owner.tolist(), self.position.tolist(), strict=True)
        return np.array([self.blocks[o].sequence.canvas[p] for o, p in pairs], dtype=np.int64)
