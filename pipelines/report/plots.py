"""The look that all plots share: colours for a light and a dark page, curves, and PNG bytes.

chart, axes = figure(dark)
curve(axes, x, y, 1, dark, "RCD")
legend(axes, dark)
data = png(chart)
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# Okabe and Ito's palette for colour-blind readers; the first colour is the baseline's.
LIGHT = ("#666666", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DARK = ("#b0b0b0", "#56b4e9", "#ff8c42", "#2ec4a0", "#e39ac4", "#f0c040", "#9ad0f5", "#ffffff")
MARKERS = "os^Dv<>P"
INK, PAPER = {False: "#222222", True: "#e6e6e6"}, {False: "#ffffff", True: "#16181c"}  # by dark; also of the page


class Plot(NamedTuple):
    """PNG bytes for a light and a dark page."""

    light: bytes
    dark: bytes


def figure(dark: bool = False, width: float = 8.0, height: float = 5.0) -> tuple[Any, Any]:
    """(matplotlib figure, its axes) of width x height inches in the page's colours; needs no display."""
    from matplotlib.figure import Figure

    ink, paper = INK[dark], PAPER[dark]
    chart = Figure(figsize=(width, height), dpi=150, facecolor=paper, layout="constrained")
    axes = chart.add_subplot(facecolor=paper)
    axes.tick_params(colors=ink)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(ink)
    axes.grid(color=ink, alpha=0.15, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(ink)
    return chart, axes


def colour(index: int, dark: bool = False) -> str:
    """Colour of the index-th curve. After eight the colours repeat with another line style."""
    return (DARK if dark else LIGHT)[index % len(LIGHT)]


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def line(index: int) -> str:
    """Line style of the index-th curve; it distinguishes curves of the same colour."""
    return ("-", "--", ":", "-.")[index // len(LIGHT) % 4]


def curve(
    axes: Any,
    x: Sequence[float],
    y: Sequence[float],
    index: int,
    dark: bool,
    label: str,
    bars: Sequence[Sequence[float]] | None = None,
) -> None:
    """Draw the index-th curve. bars: lengths of the error bars (below, above)."""
    axes.errorbar(
        x, y, yerr=bars, color=colour(index, dark), marker=marker(index), linestyle=line(index), label=label,
        markersize=5, linewidth=1.6, elinewidth=0.9, capsize=2,
    )  # fmt: skip


def legend(axes: Any, dark: bool = False, **options: Any) -> None:
    axes.legend(frameon=False, labelcolor=INK[dark], fontsize=9, **options)


def png(chart: Any) -> bytes:
    """PNG bytes without the software's version, so that equal results give equal bytes."""
    stream = io.BytesIO()
    chart.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def both(draw: Callable[[bool], bytes]) -> Plot:
    """draw(dark) for both colour schemes."""
    return Plot(draw(False), draw(True))
