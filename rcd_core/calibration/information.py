"""What plain decoding throws away: a measure that says before a training whether residuals will pay.

    found = measure(model, prompts, settings)["both"]       # decodes without residuals

A prediction is discarded if its pass leaves the position masked. y is the token that the position has at the end, p the
discarded distribution, without the mask token, and H its entropy. All values are means over discarded predictions, in
nats, unless they say otherwise:

- discarded: their number per committed token. Padding of an answer's last block counts as committed, too.
- entropy: H. surprise: -ln p(y). If predictions were calibrated, surprise would equal entropy.
- information: ln p(y) - ln m(y), with m the mean of all discarded distributions: what p says about y beyond what is
  known about any masked position.
- information_per_token: the same summed up, per committed token.
- resolved: by how much ln p(y) of a discarded prediction rises by the next pass, summed up per committed token, after
  passes that committed nothing but tokens of at least `certain` in the block. Such a token tells hardly anything that
  could not have been inferred without it.
- chosen: the same after the other passes, which had to choose among tokens that were less certain.
- both: the smaller of the two at each position, summed up per committed token. It is high where the same positions
  learn from inference and from choices.

Shapes: N predictions of a step, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rcd_core.decode_settings import DecodeSettings
from rcd_core.decoding.decoder import Decoder
from rcd_core.decoding.observer import Observed
from rcd_core.decoding.sequence import LiveBlock
from rcd_core.families.base import DiffusionModel

_BATCH = 64  # requests whose steps are held at once
_TILE_BYTES = 64 << 20


def measure(
    model: DiffusionModel, prompts: Sequence[Sequence[int]], settings: DecodeSettings, infill: bool = False
) -> dict[str, Any]:
    """Decode prompts, for infilling canvases, without residuals, and report the measures; {} if nothing was
    discarded. settings: with measured.THRESHOLD, to compare with measured.py."""
    thrown_away = ThrownAway(model)
    decoder = Decoder(model, observer=thrown_away)
    decode = decoder.infill if infill else decoder.generate
    for first in range(0, len(prompts), _BATCH):
        decode(list(prompts[first : first + _BATCH]), settings)
        thrown_away.finish()
    return thrown_away.report()


class ThrownAway:
    """An observer that sums the measures up. It keeps the hidden states of all steps until `finish`."""

    def __init__(self, model: DiffusionModel, certain: float = 0.9) -> None:
        self.model, self.certain = model, certain
        self._steps: list[_Step] = []
        self._counts = torch.zeros(model.vocab_size, dtype=torch.float64, device=model.device)  # of y
        self._mass = torch.zeros_like(self._counts)  # sum of p
        self._totals = dict.fromkeys(("predictions", "tokens", "entropy", "log_p", "resolved", "chosen", "both"), 0.0)

    def __call__(self, step: Observed) -> None:
        m = step.masked
        blocks = np.array([id(b) for b in m.blocks])[m.owner]
        self._steps.append(
            _Step(m.blocks, m.owner, blocks, m.positions, step.committed, step.discarded, step.hidden.clone())
        )
        self._totals["tokens"] += int(step.committed.sum())

    @torch.inference_mode()
    def finish(self) -> None:
        """Call when the observed requests are complete; their final tokens are taken from the canvases."""
        # (block, position) -> ln p(y) of its last prediction, which was discarded, and the sum that its rise belongs to
        before: dict[tuple[int, int], tuple[float, str]] = {}
        rises: dict[tuple[int, int], dict[str, float]] = defaultdict(lambda: {"resolved": 0.0, "chosen": 0.0})
        rows = max(1, _TILE_BYTES // (8 * self.model.vocab_size))
        for step in self._steps:
            final = torch.from_numpy(step.final()).to(self.model.device)
            log_p = np.empty(len(final))  # of y
            for first in range(0, len(final), rows):
                part = slice(first, first + rows)
                log_p[part] = self._add(
                    step.hidden[part], final[part], torch.from_numpy(step.discarded[part]).to(final.device)
                )
            keys = list(zip(step.block.tolist(), step.position.tolist(), strict=True))
            for key, now in zip(keys, log_p.tolist(), strict=True):
                if key in before:
                    last, which = before.pop(key)
                    rises[key][which] += now - last
            choices = step.block[step.committed & (log_p < math.log(self.certain))]
            which_sum = np.where(np.isin(step.block, choices), "chosen", "resolved").tolist()
            before |= {keys[i]: (float(log_p[i]), which_sum[i]) for i in np.flatnonzero(step.discarded)}
        for name in ("resolved", "chosen"):
            self._totals[name] += sum(rise[name] for rise in rises.values())
        self._totals["both"] += sum(min(rise.values()) for rise in rises.values())
        self._steps.clear()

    def report(self) -> dict[str, Any]:
        """The measures by name; {} if nothing was discarded."""
        t = self._totals
        if not t["predictions"]:
            return {}
        log_mean = (self._mass / t["predictions"]).clamp(min=1e-300).log()
        information = (t["log_p"] - float(self._counts @ log_mean)) / t["predictions"]
        tokens = max(1.0, t["tokens"])
        return {
            "predictions": int(t["predictions"]),
            "discarded": t["predictions"] / tokens,
            "entropy": t["entropy"] / t["predictions"],
            "surprise": -t["log_p"] / t["predictions"],
            "information": information,
            "information_per_token": information * t["predictions"] / tokens,
            **{name: t[name] / tokens for name in ("resolved", "chosen", "both")},
        }

    def _add(self, hidden: Tensor, final: Tensor, discarded: Tensor) -> NDArray[np.float64]:
        """Sum the discarded ones up. Returns ln p(y) (N,) of all."""
        logp = self._logp(hidden)
        of_final = logp.gather(1, final[:, None])[:, 0]
        logp, final, log_p = logp[discarded], final[discarded], of_final[discarded]
        p = logp.exp()
        self._totals["predictions"] += len(final)
        self._totals["entropy"] -= float((p * logp.clamp(min=-1e4)).sum())
        self._totals["log_p"] += float(log_p.sum())
        self._mass += p.sum(0)
        self._counts.index_add_(0, final, torch.ones_like(log_p))
        return of_final.cpu().numpy()

    def _logp(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V) fp64 log-probabilities; the mask token, which is never committed, has none."""
        logits = self.model.head(hidden).double()
        logits[:, self.model.mask_token_id] = -torch.inf
        return torch.log_softmax(logits, -1)


class _Step:
    """One step's predictions: owner (N,) index into blocks, block (N,) its id, position (N,), committed and discarded
    (N,), hidden (N, D)."""

    def __init__(
        self,
        blocks: list[LiveBlock],
        owner: NDArray[np.int64],
        block: NDArray[np.int64],
        position: NDArray[np.int64],
        committed: NDArray[np.bool_],
        discarded: NDArray[np.bool_],
        hidden: Tensor,
    ) -> None:
        self.blocks, self.owner, self.block, self.position = blocks, owner, block, position
        self.committed, self.discarded, self.hidden = committed, discarded, hidden

    def final(self) -> NDArray[np.int64]:
        """(N,) tokens that the positions have now."""
        pairs = zip(self.owner.tolist(), self.position.tolist(), strict=True)
        return np.array([self.blocks[o].sequence.canvas[p] for o, p in pairs], dtype=np.int64)
