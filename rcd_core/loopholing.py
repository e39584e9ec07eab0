"""Loopholing (arXiv 2510.19304): a pass also gets the hidden states of the pass before, at every position.

    input = E[token] + LN(h)

h is the residual stream behind the last layer, before the final norm; where there was no pass before it is 0, so that
LN gives its bias.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from rcd_core.precision import at_least_fp32


class Loophole(nn.LayerNorm):
    """LN. Its weight and bias start at 0, so that it changes nothing before it is trained."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        nn.init.zeros_(self.weight)

    def forward(self, embeds: Tensor, states: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(..., D) token embeddings, (..., D) states h; None: no pass before -> (..., D) inputs."""
        if states is None:
            return embeds + self.bias.to(embeds.dtype)
        h = at_least_fp32(states)
        added = F.layer_norm(h, self.normalized_shape, self.weight.to(h.dtype), self.bias.to(h.dtype), self.eps)
        return embeds + added.to(embeds.dtype)
