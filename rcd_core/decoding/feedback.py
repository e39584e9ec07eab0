"""What a request's settings say about its predictions: how they become residuals, and whether tokens are drawn."""

from __future__ import annotations

from rcd_core.alpha import position_rule
from rcd_core.decode_settings import DecodeSettings
from rcd_core.ops.reduce import Feedback


def temperatures(settings: DecodeSettings) -> dict[str, float]:
    """T_res is for alpha only, unless delta_temperature says otherwise (Algorithm 2, lines 23-25)."""
    t = settings.residual_temperature or 1.0
    return {"alpha_temperature": t, "delta_temperature": t if settings.delta_temperature == "residual" else 1.0}


def feedback_of(settings: DecodeSettings) -> Feedback | None:
    """None for a request that feeds nothing back from its own predictions."""
    if not settings.residual or settings.residual_source != "self":
        return None
    return Feedback(
        rule=position_rule(settings),
        alpha_scale=settings.alpha_scale,
        top_k=settings.residual_top_k,
        **temperatures(settings),
    )


def is_greedy(settings: DecodeSettings) -> bool:
    """The most probable token, and its probability in the whole prediction: nothing but the logits is looked at."""
    drawn = settings.temperature or settings.logits_eos_inf or settings.confidence_eos_eot_inf
    return not drawn and not settings.cfg_scale
