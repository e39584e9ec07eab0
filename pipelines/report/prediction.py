"""What plain decoding throws away, beside the gains of models that were measured: for `rcd predict` and the reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.report.text import Cells, Results
from rcd_core.calibration.measured import MEASURED, outlook

EXPLANATION = (
    "What masked positions learn from what a pass commits, in nats per committed token. Resolved: from passes that "
    "committed only tokens of 90 % or more, so that it could have been inferred without them. Chosen: from passes that "
    "had to commit a less certain token. Both: the smaller of the two at each position, summed up. Of the tiny models "
    "here, those whose positions learn in both ways gained from residuals. Ratios are to SeqD with the same masks, "
    "where it was trained."
)


def table(found: Mapping[str, Any], name: str) -> Cells:
    """found: measures of information.py and `prompts`. name: of the model that they are of."""
    rows = [[m.task, *map(_span, (m.resolved, m.chosen)), _span(m.both, digits=3), _span(m.gain)] for m in MEASURED]
    values = [f"{found.get(key, 0.0):.{digits}f}" for key, digits in (("resolved", 2), ("chosen", 2), ("both", 3))]
    rows.append([f"{name}, {found['prompts']} prompts", *values, ""])
    return ["model of", "resolved", "chosen", "both", "tokens per pass, RCD over SeqD"], rows


def sentence(found: Mapping[str, Any]) -> str:
    if "predictions" in found and "both" not in found:
        return "An older release measured this; `rcd predict` measures it again."
    both = found.get("both", 0.0)
    return f"At the same positions, both: {both:.3f}. {outlook(both)}"


def line(results: Results) -> str:
    """For the terminal; nothing for results without the measures."""
    found = results.get("thrown_away")
    if not found:
        return ""
    resolved, chosen = (found.get(key, 0.0) for key in ("resolved", "chosen"))
    return f"What plain decoding throws away: resolved {resolved:.2f}, chosen {chosen:.2f}. {sentence(found)}"


def _span(pair: tuple[float, float], digits: int = 2) -> str:
    low, high = (f"{value:.{digits}f}" for value in pair)
    return low if low == high else f"{low} to {high}"
