"""Alpha rules that a position's own prediction does not decide: "uniform", the block's mean, and "ramp", by the pass.

The head's reduction has written a value for each position by then; this replaces it once the pass's tokens are
committed, so that the mean is over those positions that the residuals go to. In training that is the same: there the
masks are the prediction's own.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch

from rcd_core.alpha import SPREAD
from rcd_core.decoding.prediction import Reached
from rcd_core.decoding.sequence import Sequence
from rcd_core.decoding.state import ResidualState
from rcd_core.residual import group_mean

# dInfer's IterSmooth feeds embeddings back into models that were never trained for it: with weight 0.15 after the first
# pass, 0.02 more after each further one, 0.3 at most (its cont_weight_init, _growth and cont_weight). There the count
# runs on from block to block and the threshold falls slowly from 1; here each block begins anew, so that a request can
# be gone on with from its finished blocks, and the threshold is what confidence_threshold says.
RAMP_FIRST, RAMP_GROWTH, RAMP_MOST = 0.15, 0.02, 0.3


def ramp_weight(step: int) -> float:
    """Alpha in the input of the block's pass number `step`, from 1 on; a start's residual, at 0, weighs as much."""
    return min(RAMP_FIRST + RAMP_GROWTH * max(0, step - 1), RAMP_MOST)


def spread_alpha(state: ResidualState, sequences: Many[Sequence]) -> None:
    """Settle alpha at the open positions of the requests with such a rule; others are left alone."""
    mine = [s for s in sequences if s.fed and s.settings.residual and s.settings.alpha in SPREAD]
    if not mine:
        return
    reached = Reached.of(mine)
    places, owner = (torch.from_numpy(n).to(state.device) for n in (reached.places(state.reach), reached.owner))
    ramp = reached.per_request(lambda s: ramp_weight(s.step) if s.settings.alpha == "ramp" else -1.0)
    weights = torch.from_numpy(ramp).to(state.alpha)
    alpha = torch.where(weights < 0, group_mean(state.alpha[places], owner), weights)
    state.alpha.index_copy_(0, places, alpha)
