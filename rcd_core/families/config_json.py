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
    return {name: getattr(config, name) for name in _WRITTEN if hasattr(config, name)} | write_rope(
        config.rope_parameters
    )


def read_rope(config: dict[str, Any], where: Path, default_theta: float | None = None) -> dict[str, Any]:
    """config.json of transformers 5 (rope_parameters) or earlier (rope_theta, rope_scaling) -> rope_parameters.

    Raises UserError for an unsupported type, for a field that is missing or not above 0, and if two places of the file
    state different values of one setting.
    """
    stated = _stated_rope(config, where)
    kind, where_kind = stated.get("rope_type", ("default", "rope_scaling"))
    if kind not in _NEEDED or stated.get("partial_rotary_factor", (1.0, ""))[0] != 1.0:
        raise UserError(
            f"{where}: config.json's {where_kind.split('.')[0]} is of type {kind!r}; supported, over the whole head: "
            f"{', '.join(_NEEDED)}"
        )
    if "rope_type" not in stated and "factor" in stated:
        raise UserError(f"{where}: config.json's {stated['factor'][1]} is set, but no rope_type; set rope_type as well")
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": stated.get("rope_theta", (default_theta, ""))[0]}
    for name in _NEEDED[kind]:
        # Files older than the field use max_position_embeddings.
        default = config.get("max_position_embeddings") if name.startswith("original") else None
        rope[name] = stated.get(name, (default, ""))[0]
    for name, value in rope.items():
        if name != "rope_type" and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            raise UserError(f"{where}: config.json's {name} is {value!r}; rotary embeddings need a number above 0")
    return rope | {name: stated[name][0] for name in _OPTIONAL.get(kind, ()) if name in stated}


def _stated_rope(config: dict[str, Any], where: Path) -> dict[str, tuple[Any, str]]:
    """Rotary setting -> (value, field of config.json that states it), from every place that a file may use.

    null states nothing. Raises UserError for two values of one setting, and for two sections with a type of which one
    has a setting that the other lacks: the latter means its default.
    """
    sections: dict[str, dict[str, Any]] = {}
    for section in ("rope_parameters", "rope_scaling"):
        content = config.get(section) or {}
        if not isinstance(content, dict):
            raise UserError(f"{where}: config.json's {section} is {content!r}; it must be an object or null")
        if any(isinstance(value, dict) for value in content.values()):
            raise UserError(
                f"{where}: config.json's {section} is given per layer type; supported, over the whole head: "
                f"{', '.join(_NEEDED)}"
            )
        sections[section] = {name: value for name, value in content.items() if value is not None}
    stated: dict[str, tuple[Any, str]] = {}

    def add(name: str, value: Any, field: str) -> None:
        known, first = stated.setdefault(name, (value, field))
        if known != value:
            raise UserError(
                f"{where}: config.json's {first} is {known!r}, but {field} is {value!r}; they are one setting, so "
                "remove the wrong one"
            )

    for section, content in sections.items():
        for name, value in content.items():
            add("rope_type" if name == "type" else name, value, f"{section}.{name}")
    for name in ("rope_theta", "original_max_position_embeddings"):
        if config.get(name) is not None:
            add(name, config[name], name)
    if all("rope_type" in content or "type" in content for content in sections.values()):
        needed = {*_NEEDED.get(stated["rope_type"][0], ()), *_OPTIONAL.get(stated["rope_type"][0], ())}
        for name in sorted(needed):
            values = [content.get(name) for content in sections.values()]
            if values[0] != values[1]:
                raise UserError(
                    f"{where}: config.json's rope_parameters.{name} is {values[0]!r}, but rope_scaling.{name} is "
                    f"{values[1]!r}; they are one setting, so remove one of the two sections"
                )
    return stated


def write_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """transformers' rope_parameters -> rope_theta and rope_scaling, as transformers 4 and the authors' code expect."""
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
    }
