"""LLaDA: Llama with the causal mask removed (semantics.md 2). Plain Llama checkpoints load as a start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rcd_core.errors import UserError
from rcd_core.families.base import CheckpointInfo, DiffusionModel, require_fields
from rcd_core.families.config import ModelConfig

MODEL_TYPES = ("llada", "llama")
MASK_TOKEN_ID = 126336
EOS_TOKEN_ID = 126081
TURN_END_ID = 126348  # <|eot_id|>
BLOCK_LENGTH = 32

# LLaDA name -> Llama name inside a layer. Two tensors are called ff_out: the MLP output here, the head outside.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_TOP_NAMES = {
    "model.transformer.wte.weight": "model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
}
_LAYER_NAMES_BACK = {llama: llada for llada, llama in _LAYER_NAMES.items()}
_TOP_NAMES_BACK = {llama: llada for llada, llama in _TOP_NAMES.items()}


class LLaDAModel(DiffusionModel):
    family = "llada"
    threshold_inclusive = True
    blocks_from_prompt_end = True
    default_start = "reference"

    def attention_block(self, block_length: int) -> int | None:
        return None

    def official_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        c = self.config
        config = {
            "activation_type": "silu",
            "alibi": False,
            "architectures": ["LLaDAModelLM"],
            "attention_dropout": 0.0,
            "attention_layer_norm": False,
            "block_length": self.info.block_length,
            "block_type": "llama",
            "d_model": c.hidden_size,
            "embedding_dropout": 0.0,
            "embedding_size": c.vocab_size,
            "eos_token_id": self.info.eos_token_ids[0],
            "include_bias": False,
            "include_qkv_bias": False,
            "init_device": "meta",
            "input_emb_norm": False,
            "layer_norm_type": "rms",
            "layer_norm_with_affine": True,
            "mask_token_id": self.info.mask_token_id,
            "max_sequence_length": c.max_position_embeddings,
            "mlp_hidden_size": c.intermediate_size,
            "mlp_ratio": 4,
            "model_type": "llada",
            "n_heads": c.num_attention_heads,
            "n_kv_heads": c.num_key_value_heads,
            "n_layers": c.num_hidden_layers,
            "pad_token_id": self.info.pad_token_id,
            "residual_dropout": 0.0,
            "rms_norm_eps": c.rms_norm_eps,
            "rope": True,
            "rope_full_precision": True,
            "rope_theta": c.rope_parameters["rope_theta"],
            "scale_logits": False,
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "vocab_size": c.vocab_size,
            "weight_tying": c.tie_word_embeddings,
        }
        weights = {_to_llada(name): tensor for name, tensor in self.backbone.state_dict().items()}
        if c.tie_word_embeddings:
            del weights["model.transformer.ff_out.weight"]
        return config, weights


def _to_llada(name: str) -> str:
    if name in _TOP_NAMES_BACK:
        return _TOP_NAMES_BACK[name]
    layer, inner = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name).groups()  # type: ignore[union-attr]
    return f"model.transformer.blocks.{layer}.{_LAYER_NAMES_BACK[inner]}.weight"


def rename_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """LLaDA names -> Llama names; Llama's own names pass through."""
    renamed = {}
    for name, tensor in weights.items():
        match = re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.weight", name)
        if match and match[2] in _LAYER_NAMES:
            name = f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"
        renamed[_TOP_NAMES.get(name, name)] = tensor
    return renamed


def backbone_config(config: dict[str, Any], where: Path) -> LlamaConfig:
    """LlamaConfig of a LLaDA or Llama config.json. The file's values count, never LLaDA's class defaults."""
    if config["model_type"] == "llama":
        return LlamaConfig(**{k: v for k, v in config.items() if k not in ("architectures", "model_type", "rcd")})
    require_fields(config, ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "rope_theta", "rms_norm_eps"), where)
    if config.get("include_bias") or config.get("include_qkv_bias") or config.get("block_type", "llama") != "llama":
        raise UserError(f"{where}: this LLaDA variant (biases or block_type) is not supported; the dense 8B models are")
    return LlamaConfig(
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=config.get("n_kv_heads") or config["n_heads"],
        max_position_embeddings=config.get("max_sequence_length", 4096),
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        tie_word_embeddings=config.get("weight_tying", False),
    )


def build_backbone(config: LlamaConfig) -> LlamaForCausalLM:
    return LlamaForCausalLM(config)


def checkpoint_info(config: dict[str, Any], generation: dict[str, Any]) -> CheckpointInfo:
    eos = config.get("eos_token_id", generation.get("eos_token_id", EOS_TOKEN_ID))
    eos_ids = tuple(eos) if isinstance(eos, list) else (eos,)
    pad = config.get("pad_token_id")
    return CheckpointInfo(
        mask_token_id=config.get("mask_token_id", MASK_TOKEN_ID),
        eos_token_ids=tuple(int(e) for e in eos_ids),
        pad_token_id=int(eos_ids[0] if pad is None else pad),
        block_length=config.get("block_length") or BLOCK_LENGTH,
        rcd=config.get("rcd") or {},
        turn_end_ids=(TURN_END_ID,) if eos_ids == (EOS_TOKEN_ID,) else (),
    )


def fresh_config(start: ModelConfig, vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=start.hidden_size,
        intermediate_size=start.intermediate_size,
        num_hidden_layers=start.num_layers,
        num_attention_heads=start.num_heads,
        num_key_value_heads=start.num_kv_heads,
        head_dim=start.resolved_head_dim,
        max_position_embeddings=start.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": start.rope_theta},
        tie_word_embeddings=start.tie_embeddings,
    )


MODEL = LLaDAModel
