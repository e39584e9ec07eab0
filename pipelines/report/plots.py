"""The look that all plots share: a figure for a light or a dark page, colours, and PNG bytes.

made, axes = figure(dark)
axes.plot(x, y, color=colour(1, dark), marker=marker(1), label="RCD")
legend(axes, dark)
data = png(made)
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

# Okabe and Ito's colours, told apart by readers with any colour vision; the first is the baseline's.
LIGHT = ("#666666", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DARK = ("#b0b0b0", "#56b4e9", "#ff8c42", "#2ec4a0", "#e39ac4", "#f0c040", "#9ad0f5", "#ffffff")
MARKERS = "os^Dv<>P"
INK, PAPER = {False: "#222222", True: "#e6e6e6"}, {False: "#ffffff", True: "#16181c"}  # by dark; the page's own

Plot = tuple[bytes, bytes]  # PNG for a light page, PNG for a dark one


def figure(dark: bool = False, width: float = 8.0, height: float = 5.0) -> tuple[Any, Any]:
    """(matplotlib figure, its axes) of width x height inches in the page's colours, without a display."""
    from matplotlib.figure import Figure

    ink, paper = INK[dark], PAPER[dark]
    made = Figure(figsize=(width, height), dpi=150, facecolor=paper, layout="constrained")
    axes = made.add_subplot(facecolor=paper)
    axes.tick_params(colors=ink)
    axes.xaxis.label.set_color(ink)
    axes.yaxis.label.set_color(ink)
    axes.title.set_color(ink)
    axes.grid(color=ink, alpha=0.15, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(ink)
    return made, axes


def colour(index: int, dark: bool = False) -> str:
    """Of the index-th arm; after eight they begin again, and the line style of `line` differs."""
    return (DARK if dark else LIGHT)[index % len(LIGHT)]


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def line(index: int) -> str:
    """A line style: arms of equal colour are told apart by it."""
    return ("-", "--", ":", "-.")[index // len(LIGHT) % 4]


def legend(axes: Any, dark: bool = False, **place: Any) -> None:
    axes.legend(frameon=False, labelcolor=INK[dark], fontsize=9, **place)


def png(made: Any) -> bytes:
    """Without the version of the software inside: equal results give equal bytes."""
    stream = io.BytesIO()
    made.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def both(draw: Callable[[bool], bytes]) -> Plot:
    """draw(dark) in the two schemes."""
    return draw(False), draw(True)
