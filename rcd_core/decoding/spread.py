"""Alpha rules that a position's own prediction does not decide: "uniform", the block's mean, and "ramp", by the pass.

The head's reduction has written a value for each position by then; this replaces it once the pass's tokens are
committed, so that the mean is over those positions that the residuals go to. In training that is the same: there the
masks are the prediction's own.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch

from rcd_core.alpha import block_alpha, ramp_weight
from rcd_core.decode_settings import BLOCK_RULES
from rcd_core.decoding.prediction import Reached
from rcd_core.decoding.sequence import Sequence
from rcd_core.decoding.state import ResidualState


def spread_alpha(state: ResidualState, sequences: Many[Sequence]) -> None:
    """Settle alpha at the open positions of the requests with such a rule; others are left alone."""
    mine = [s for s in sequences if s.fed and s.settings.residual and s.settings.alpha in BLOCK_RULES]
    if not mine:
        return
    reached = Reached.of(mine)
    places, owner = (torch.from_numpy(n).to(state.device) for n in (reached.places(state.reach), reached.owner))
    ramp = reached.per_request(lambda s: ramp_weight(s.step) if s.settings.alpha == "ramp" else -1.0)
    weights = torch.from_numpy(ramp).to(state.alpha)
    state.alpha.index_copy_(0, places, block_alpha(state.alpha[places], owner, weights))
