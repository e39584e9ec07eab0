"""Fields of config.json that Qwen3, Llama and SDAR checkpoints share: sizes and rotary scaling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rcd_core.errors import UserError

_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_WRITTEN = (
    *("attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings"),
    *("num_attention_heads", "num_hidden_layers", "num_key_value_heads", "tie_word_embeddings"),
)
# Supported rotary scaling: type -> required fields, optional fields; other fields are dropped. Angles depend on the
# position only. Those of `dynamic` and `longrope` also depend on the input length: a neighbour in the batch or a
# cached prefix would change a result.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}


def require_fields(config: dict[str, Any], names: tuple[str, ...], where: Path) -> None:
    """Raise UserError if a field is absent or null."""
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise UserError(f"{where}: config.json lacks {', '.join(missing)}; is the download complete?")


def require_values(config: dict[str, Any], allowed: dict[str, Any], where: Path) -> None:
    """Raise UserError if a field is set to a value other than the supported one."""
    for field, value in allowed.items():
        if config.get(field) is not None and config[field] != value:
            raise UserError(
                f"{where}: config.json's {field} is {config[field]!r}; only {json.dumps(value)} is supported"
            )


def read_sizes(config: dict[str, Any], where: Path, has_head: bool, *, max_positions: int) -> dict[str, Any]:
    """Arguments that Qwen3Config and LlamaConfig share, from a config.json in transformers' names.

    has_head: whether the weights contain an LM head; decides weight tying if config.json does not.
    max_positions: default of max_position_embeddings. Raises UserError for a missing required field.
    """
    require_fields(config, _REQUIRED, where)
    tied = config.get("tie_word_embeddings")
    return {name: config[name] for name in _REQUIRED} | {
        "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "hidden_act": config.get("hidden_act", "silu"),
        "max_position_embeddings": config.get("max_position_embeddings", max_positions),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": not has_head if tied is None else tied,
        "attention_bias": config.get("attention_bias", False),
    }


def write_sizes(config: Any) -> dict[str, Any]:
    """The fields of config.json that SDAR and Llama checkpoints share, from a Qwen3Config or LlamaConfig."""
    return {name: getattr(config, name) for name in _WRITTEN} | write_rope(config.rope_parameters)


def read_rope(config: dict[str, Any], where: Path, default_theta: float | None = None) -> dict[str, Any]:
    """config.json of transformers 5 (rope_parameters) or earlier (rope_scaling) -> transformers' rope_parameters.

    Raises UserError for an unsupported type, and for a field (rope_theta included) that is missing or not above 0.
    """
    section = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    scaling = config.get(section) or {}
    if not isinstance(scaling, dict):
        raise UserError(f"{where}: config.json's {section} is {scaling!r}; it must be an object or null")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    per_layer = any(isinstance(value, dict) for value in scaling.values())
    if kind not in _NEEDED or per_layer or scaling.get("partial_rotary_factor", 1.0) != 1.0:
        shown = "given per layer type" if per_layer else f"of type {kind!r}"
        raise UserError(
            f"{where}: config.json's {section} is {shown}; supported, over the whole head: {', '.join(_NEEDED)}"
        )
    theta = scaling.get("rope_theta", config.get("rope_theta", default_theta))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    for name in _NEEDED[kind]:
        # Files older than the field use max_position_embeddings.
        rope[name] = scaling.get(name, config.get("max_position_embeddings") if name.startswith("original") else None)
    for name, value in rope.items():
        if name != "rope_type" and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            raise UserError(f"{where}: config.json's {name} is {value!r}; rotary embeddings need a number above 0")
    return rope | {name: scaling[name] for name in _OPTIONAL.get(kind, ()) if scaling.get(name) is not None}


def write_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """transformers' rope_parameters -> rope_theta and rope_scaling, as transformers 4 and the authors' code expect."""
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
    }
