"""Rotary scaling of Qwen3 and Llama checkpoints, in the form of transformers 5 (`rope_parameters`) or before it.

Accepted are the kinds whose angles depend on the position alone. `dynamic` and `longrope` change with the length of
the input, so that a neighbour in the batch or a cached prefix would change a result: they are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rcd_core.errors import UserError

# Kind -> fields it needs, fields it may have. Everything else of the section is dropped.
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}


def read_rope(config: dict[str, Any], where: Path, default_theta: float | None = None) -> dict[str, Any]:
    """config.json -> transformers' rope_parameters: rope_type, rope_theta and the fields of that type.

    UserError for a kind that is not supported, a field that is missing or no number above 0, and where rope_theta is in
    neither place and the family has no default.
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
        # Files older than the field mean the length in max_position_embeddings.
        rope[name] = scaling.get(name, config.get("max_position_embeddings") if name.startswith("original") else None)
    for name, value in rope.items():
        if name != "rope_type" and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
            raise UserError(f"{where}: config.json's {name} is {value!r}; rotary embeddings need a number above 0")
    return rope | {name: scaling[name] for name in _OPTIONAL.get(kind, ()) if scaling.get(name) is not None}


def write_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """transformers' rope_parameters -> rope_theta and rope_scaling, as the authors' releases (4.x) read them."""
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
    }
