"""Attention: layouts say which query sees which key; backends compute it inside transformers' layers."""

from rcd_core.attention.backends import backend_key
from rcd_core.attention.layouts import (
    PADDING,
    Layout,
    PackedTokens,
    bidirectional,
    block_causal,
    block_diffusion,
    causal_blocks,
)

__all__ = ["PADDING", "Layout", "PackedTokens", "backend_key", "bidirectional", "block_causal"]
__all__ += ["block_diffusion", "causal_blocks"]
