"""The layers of LLaDA-MoE with the options of the authors' code that transformers' Qwen3-MoE layers lack: shared
experts, biases of the experts, clipped queries, keys and values, and rotation of a part of each head. Without options
they are those layers. No released model has options.

Shapes: B rows, Q tokens, T = B Q, H heads, d head width, D width, E experts, K of them chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeForCausalLM,
    Qwen3MoeMLP,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
    eager_attention_forward,
)


class Attention(Qwen3MoeAttention):
    """clip: largest size of each number of queries and keys, behind their norms, and of values; None: any."""

    clip: float | None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any,
        past_key_values: Any = None,  # of transformers; there is no cache here
        **more: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, Q, D) -> (B, Q, D), and the weights where the attention function returns them."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads))
        key = self.k_norm(self.k_proj(hidden_states).view(heads))
        value = self.v_proj(hidden_states).view(heads)
        if self.clip is not None:
            query, key, value = (x.clamp(-self.clip, self.clip) for x in (query, key, value))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)  # type: ignore[no-untyped-call]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **more)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class Router(Qwen3MoeTopKRouter):
    """Each expert's bias (E,) is added to its probability before the choice, and stays in its weight."""

    expert_bias: nn.Parameter

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, D) -> (T, E) logits, (T, K) weights, (T, K) experts."""
        logits = F.linear(hidden_states, self.weight)
        scores = torch.softmax(logits, -1, dtype=torch.float) + self.expert_bias.float()
        weights, experts = scores.topk(self.top_k, dim=-1)
        return logits, weights.to(logits.dtype), experts


class Mixture(Qwen3MoeSparseMoeBlock):
    """With an MLP that every token meets, without a gate."""

    shared_expert: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, Q, D) -> (B, Q, D)."""
        shared: Tensor = self.shared_expert(hidden_states)
        return super().forward(hidden_states) + shared


class LLaDAMoEForCausalLM(Qwen3MoeForCausalLM):  # type: ignore[no-untyped-call]
    """Its configuration has, beside Qwen3MoeConfig's fields, clip_qkv, moe_router_enable_expert_bias and
    shared_expert_intermediate_size, and a partial_rotary_factor in rope_parameters."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """That the experts run as one grouped product. transformers would look for it in the text of this file."""
        return True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        partial = config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0
        if partial:
            self.model.rotary_emb = Glm4MoeRotaryEmbedding(config)
        for layer in self.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            if partial or config.clip_qkv is not None:
                attention.__class__, attention.clip = Attention, config.clip_qkv
            if not hasattr(mlp, "experts"):
                continue
            if config.moe_router_enable_expert_bias:
                mlp.gate.__class__ = Router
                mlp.gate.expert_bias = nn.Parameter(torch.zeros(config.num_experts))
            if config.shared_expert_intermediate_size:
                mlp.__class__ = Mixture
                columns = config.shared_expert_intermediate_size
                mlp.shared_expert = Qwen3MoeMLP(config, columns)  # type: ignore[no-untyped-call]
