"""Attention: layouts say which query sees which key, backends compute it inside transformers' layers."""

from rcd_core.attention.backends import BACKENDS as BACKENDS
from rcd_core.attention.backends import backend_key as backend_key
from rcd_core.attention.backends import reads_pools as reads_pools
from rcd_core.attention.layouts import PADDING as PADDING
from rcd_core.attention.layouts import Layout as Layout
from rcd_core.attention.layouts import PackedTokens as PackedTokens
from rcd_core.attention.layouts import bidirectional as bidirectional
from rcd_core.attention.layouts import block_causal as block_causal
from rcd_core.attention.layouts import block_diffusion as block_diffusion
