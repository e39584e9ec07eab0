"""LLaDA: Llama without the causal mask. Plain Llama checkpoints load as starting weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.config_json import read_rope, read_sizes, require_fields, require_values, write_sizes
from rcd_core.families.files import CheckpointFiles

MASK_TOKEN_ID = 126336
EOS_TOKEN_ID = 126081
TURN_END_ID = 126348  # <|eot_id|>
VOCABULARY = 126464  # of LLaDA-8B and LLaDA-1.5; their ids mean something else in iLLaDA's 155,136
BLOCK_LENGTH = 32

# LLaDA name -> Llama name inside a layer. ff_out is the MLP output inside a layer and the LM head outside.
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
# The one network that LLaDA's switches describe in its releases. The class defaults differ, so an
# export writes all switches.
_SWITCHES: dict[str, Any] = {
    "activation_type": "silu", "alibi": False, "attention_layer_norm": False, "bias_for_layer_norm": False,
    "block_group_size": 1, "block_type": "llama", "include_bias": False, "include_qkv_bias": False,
    "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True, "rope": True,
    "scale_logits": False,
}  # fmt: skip
# Written as in the releases; nothing computed here depends on them.
_INERT: dict[str, Any] = {
    "alibi_bias_max": 8.0, "attention_dropout": 0.0, "attention_layer_norm_with_affine": True,
    "embedding_dropout": 0.0, "flash_attention": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "mlp_ratio": 4, "multi_query_attention": None, "precision": "amp_bf16",
    "residual_dropout": 0.0, "rope_full_precision": True, "use_cache": False,
}  # fmt: skip
_LLADA_LAYER_NAMES = {llama: llada for llada, llama in _LAYER_NAMES.items()}
_LLADA_TOP_NAMES = {llama: llada for llada, llama in _TOP_NAMES.items()}


class LLaDAModel(DiffusionModel):
    family = "llada"
    model_types: ClassVar[tuple[str, ...]] = ("llada", "llama")
    transformers_name = "Llama"
    threshold_inclusive = True
    whole_canvas = True
    blocks_from_prompt_end = True
    default_start = "reference"

    def attention_block(self, block_length: int) -> int | None:
        return None

    def official_files(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """In LLaDA's format where it can describe the network (_fits_llada), else in Llama's."""
        c, weights = self.config, self.stored_weights()
        common = self.common_fields() | {"block_length": self.info.block_length}
        if not _fits_llada(c):
            llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": c.mlp_bias}
            return common | write_sizes(c) | llama, weights
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
        return common | _SWITCHES | _INERT | config, {_llada_name(name): tensor for name, tensor in weights.items()}

    @classmethod
    def read_config(cls, config: dict[str, Any], where: Path, has_head: bool) -> Any:
        """LlamaConfig of a LLaDA or Llama config.json. LLaDA's class defaults are never used."""
        if config["model_type"] == "llama":
            return cls.config_class()(
                **read_sizes(config, where, has_head, max_positions=2048),
                head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
                rope_parameters=read_rope(config, where, default_theta=10_000.0),  # Llama 1 and 2 do not name it
                mlp_bias=config.get("mlp_bias", False),
            )
        names = ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "rope_theta", "rms_norm_eps")
        require_fields(config, names, where)
        require_values(config, {**_SWITCHES, "multi_query_attention": False, "rope_scaling": None}, where)
        rope = read_rope(config, where)
        require_values({"rope_parameters": rope["rope_type"]}, {"rope_parameters": "default"}, where)
        tied = config.get("weight_tying")
        return cls.config_class()(
            vocab_size=config.get("embedding_size") or config["vocab_size"],
            hidden_size=config["d_model"],
            intermediate_size=config["mlp_hidden_size"],
            num_hidden_layers=config["n_layers"],
            num_attention_heads=config["n_heads"],
            num_key_value_heads=config.get("n_kv_heads") or config["n_heads"],
            max_position_embeddings=config.get("max_sequence_length", 4096),
            rms_norm_eps=config["rms_norm_eps"],
            rope_parameters=rope,
            tie_word_embeddings=not has_head if tied is None else tied,
        )

    @classmethod
    def read_info(cls, files: CheckpointFiles) -> CheckpointInfo:
        """Missing ids default to LLaDA's, if the vocabulary is. Other models (iLLaDA, a plain Llama) have their own
        eos, and their mask token must be configured."""
        size = files.config.get("embedding_size") or files.config.get("vocab_size")
        plain = files.config["model_type"] == "llama" or size != VOCABULARY
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

    @classmethod
    def backbone_name(cls, name: str) -> str:
        """LLaDA's name of a tensor -> Llama's name. Llama's names are returned unchanged."""
        match = re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.weight", name)
        if match and match[2] in _LAYER_NAMES:
            return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"
        return _TOP_NAMES.get(name, name)


def _fits_llada(c: Any) -> bool:
    """Whether LLaDA's config.json can describe this network. If not, the authors' code would compute another one."""
    return bool(
        c.rope_parameters["rope_type"] == "default"
        and c.head_dim * c.num_attention_heads == c.hidden_size
        and not (c.attention_bias or c.mlp_bias)
        and c.hidden_act == "silu"
    )


def _llada_name(name: str) -> str:
    """Llama's name of a tensor -> LLaDA's name."""
    if name in _LLADA_TOP_NAMES:
        return _LLADA_TOP_NAMES[name]
    layer, inner = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name).groups()  # type: ignore[union-attr]
    return f"model.transformer.blocks.{layer}.{_LLADA_LAYER_NAMES[inner]}.weight"
