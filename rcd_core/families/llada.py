"""LLaDA: Llama with the causal mask removed (semantics.md 2). Plain Llama checkpoints load as a start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.config import ModelConfig
from rcd_core.families.files import CheckpointFiles, require_fields, require_values
from rcd_core.families.rope import read_rope, write_rope

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
# The one network that LLaDA's many switches describe in its releases (semantics.md 2.1). Their class defaults differ:
# an export names them all.
_SWITCHES: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "scale_logits": False,
}
# Written as in the releases; nothing that is computed here depends on them.
_INERT: dict[str, Any] = {
    "alibi_bias_max": 8.0,
    "attention_dropout": 0.0,
    "attention_layer_norm_with_affine": True,
    "embedding_dropout": 0.0,
    "flash_attention": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rope_full_precision": True,
    "use_cache": False,
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
        """LLaDA's format; Llama's own for what LLaDA's cannot say, rotary scaling above all (_is_llada)."""
        c, weights = self.config, dict(self.backbone.state_dict())
        if c.tie_word_embeddings:
            del weights["lm_head.weight"]
        common = {
            "block_length": self.info.block_length,
            "rms_norm_eps": c.rms_norm_eps,
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "vocab_size": c.vocab_size,
            **self.special_ids(),
        }
        if not _is_llada(c):
            return common | _llama_fields(c), weights
        config = {
            "architectures": ["LLaDAModelLM"],
            "d_model": c.hidden_size,
            "embedding_size": c.vocab_size,
            "max_sequence_length": c.max_position_embeddings,
            "mlp_hidden_size": c.intermediate_size,
            "model_type": "llada",
            "n_heads": c.num_attention_heads,
            "n_kv_heads": c.num_key_value_heads,
            "n_layers": c.num_hidden_layers,
            "rope_theta": c.rope_parameters["rope_theta"],
            "weight_tying": c.tie_word_embeddings,
        }
        return common | _SWITCHES | _INERT | config, {_to_llada(name): tensor for name, tensor in weights.items()}


def _is_llada(c: Any) -> bool:
    """Whether LLaDA's config.json can describe this network: its authors' code would compute another one otherwise."""
    return (
        c.rope_parameters["rope_type"] == "default"
        and c.head_dim * c.num_attention_heads == c.hidden_size
        and not (c.attention_bias or c.mlp_bias)
        and c.hidden_act == "silu"
    )


def _llama_fields(c: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": c.attention_bias,
        "head_dim": c.head_dim,
        "hidden_act": c.hidden_act,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_position_embeddings,
        "mlp_bias": c.mlp_bias,
        "model_type": "llama",
        "num_attention_heads": c.num_attention_heads,
        "num_hidden_layers": c.num_hidden_layers,
        "num_key_value_heads": c.num_key_value_heads,
        "tie_word_embeddings": c.tie_word_embeddings,
        **write_rope(c.rope_parameters),
    }


def _to_llada(name: str) -> str:
    if name in _TOP_NAMES_BACK:
        return _TOP_NAMES_BACK[name]
    layer, inner = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name).groups()  # type: ignore[union-attr]
    return f"model.transformer.blocks.{layer}.{_LAYER_NAMES_BACK[inner]}.weight"


def backbone_name(name: str) -> str:
    """LLaDA's name of a tensor -> Llama's; Llama's own names pass through."""
    match = re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.weight", name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"
    return _TOP_NAMES.get(name, name)


def backbone_config(config: dict[str, Any], where: Path, has_head: bool) -> LlamaConfig:
    """LlamaConfig of a LLaDA or Llama config.json. The file's values count, never LLaDA's class defaults.

    has_head: whether the files hold a head, for a config that does not say if it is tied.
    """
    if config["model_type"] == "llama":
        return _config_of_llama(config, where, has_head)
    require_fields(config, ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "rope_theta", "rms_norm_eps"), where)
    require_values(config, {**_SWITCHES, "multi_query_attention": False, "rope_scaling": None}, where)
    tied = config.get("weight_tying")
    return LlamaConfig(
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=config.get("n_kv_heads") or config["n_heads"],
        max_position_embeddings=config.get("max_sequence_length", 4096),
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters=read_rope(config, where),
        tie_word_embeddings=not has_head if tied is None else tied,
    )


def _config_of_llama(config: dict[str, Any], where: Path, has_head: bool) -> LlamaConfig:
    require_fields(
        config, ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), where
    )
    heads, tied = config["num_attention_heads"], config.get("tie_word_embeddings")
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        hidden_act=config.get("hidden_act", "silu"),
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=not has_head if tied is None else tied,
        rope_parameters=read_rope(config, where, default_theta=10_000.0),  # Llama 1 and 2 do not name it
        attention_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
    )


def build_backbone(config: LlamaConfig) -> LlamaForCausalLM:
    return LlamaForCausalLM(config)


def checkpoint_info(files: CheckpointFiles) -> CheckpointInfo:
    """LLaDA's ids where the files are silent; a plain Llama has its own eos and must be given a mask token."""
    plain = files.config["model_type"] == "llama"
    eos = files.eos_token_ids(() if plain else (EOS_TOKEN_ID,))
    mask = files.mask_token_id(None if plain else MASK_TOKEN_ID)
    return CheckpointInfo(
        mask_token_id=mask,
        eos_token_ids=eos,
        pad_token_id=files.pad_token_id(eos[0] if eos else mask),
        block_length=files.block_length(("block_length",), BLOCK_LENGTH),
        rcd=files.rcd(),
        turn_end_ids=(TURN_END_ID,) if eos == (EOS_TOKEN_ID,) else (),
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
