"""What plain decoding throws away, beside the gains of models that were measured: for `rcd predict` and the reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.report.text import Cells, Results
from rcd_core.calibration.measured import MEASURED, outlook

EXPLANATION = (
    "Nats per committed token. Thrown away: what discarded predictions say about the tokens that are committed in the "
    "end. Resolved: what masked positions learn from tokens that were nearly certain and could have been inferred "
    "without them. Residuals need both."
)


def table(found: Mapping[str, Any], name: str) -> Cells:
    """found: measures of information.py and `prompts`. name: of the model that they are of."""
    rows = [[m.task, *map(_span, (m.thrown_away, m.resolved, m.gain))] for m in MEASURED]
    values = [f"{found.get(key, 0.0):.2f}" for key in ("information_per_token", "resolved")]
    rows.append([f"{name}, {found['prompts']} prompts", *values, ""])
    return ["model of", "thrown away", "resolved", "tokens per pass, RCD over SeqD"], rows


def sentence(found: Mapping[str, Any]) -> str:
    useful = found.get("useful", 0.0)
    return f"The smaller of the two is {useful:.2f}. {outlook(useful)}"


def line(results: Results) -> str:
    """For the terminal; nothing for results without the measures."""
    found = results.get("thrown_away")
    if not found:
        return ""
    thrown_away, resolved = (found.get(key, 0.0) for key in ("information_per_token", "resolved"))
    measured = f"SeqD throws away {thrown_away:.2f} nats per token, and certain tokens resolve {resolved:.2f}."
    return f"{measured} {sentence(found)}"


def _span(pair: tuple[float, float]) -> str:
    low, high = (f"{value:.2f}" for value in pair)
    return low if low == high else f"{low} to {high}"
