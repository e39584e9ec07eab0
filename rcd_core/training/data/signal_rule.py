"""Which part of the reference's predictions is kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SignalRule:
    """top_k: entries kept per masked position. keep_mass: of these only as many as reach this probability, null: all.

    alpha_temperature divides the logits behind the entropy, delta_temperature those behind the kept probabilities.
    """

    top_k: int = 32
    keep_mass: float | None = None
    alpha_temperature: float = 1.0
    delta_temperature: float = 1.0
