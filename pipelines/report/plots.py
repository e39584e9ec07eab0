"""The look that all plots share: colours for a light and a dark page, sizes for a screen and a phone, PNG bytes.

chart, axes = figure(look)
curve(axes, x, y, 1, look.dark, "RCD")
legend(axes, look)
data = png(chart)
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# Okabe and Ito's palette for colour-blind readers; the first colour is the baseline's.
LIGHT = ("#666666", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DARK = ("#b0b0b0", "#56b4e9", "#ff8c42", "#2ec4a0", "#e39ac4", "#f0c040", "#9ad0f5", "#ffffff")
MARKERS = "os^Dv<>P"
INK, PAPER = {False: "#222222", True: "#e6e6e6"}, {False: "#ffffff", True: "#16181c"}  # by dark; also of the page
NARROW_INCHES, NARROW_CHARACTERS = 4.0, 44  # of a plot for phones, and of a line of text in it


class Look(NamedTuple):
    """narrow: for a phone, with the legend below the plot."""

    dark: bool = False
    narrow: bool = False


SCREEN = Look()


class Plot(NamedTuple):
    """PNG bytes for a light and a dark page; narrow: the same two for a phone."""

    light: bytes
    dark: bytes
    narrow: tuple[bytes, bytes] | None = None


def figure(look: Look = SCREEN, width: float = 8.0, height: float = 5.0) -> tuple[Any, Any]:
    """(matplotlib figure, its axes) of width x height inches in the page's colours; needs no display."""
    from matplotlib.figure import Figure

    ink, paper = INK[look.dark], PAPER[look.dark]
    size, dpi = ((NARROW_INCHES, NARROW_INCHES), 200) if look.narrow else ((width, height), 150)
    chart = Figure(figsize=size, dpi=dpi, facecolor=paper, layout="constrained")
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


def percent_axis(axes: Any) -> None:
    """End the y axis at 0 and 100 where it goes beyond, with room for a marker. Call it after all curves."""
    room, (low, high) = 1.5, axes.get_ylim()
    axes.set_ylim(max(low, -room), min(high, 100 + room))
    axes.set_yticks([tick for tick in axes.get_yticks() if max(low, 0) <= tick <= min(high, 100)])


def legend(axes: Any, look: Look = SCREEN, **options: Any) -> None:
    """On a phone, below the plot and in as many rows as it has entries. Titles and labels are wrapped there, too."""
    if not look.narrow:
        axes.legend(frameon=False, labelcolor=INK[look.dark], fontsize=9, **options)
        return
    axes.set_xlabel(textwrap.fill(axes.get_xlabel(), NARROW_CHARACTERS))
    axes.set_title(textwrap.fill(axes.get_title(), NARROW_CHARACTERS), fontsize=10)
    lines, names = axes.get_legend_handles_labels()
    axes.figure.set_figheight(NARROW_INCHES + 0.2 * len(names))
    place = {"loc": "outside lower left", "fontsize": 10, "frameon": False, "labelcolor": INK[look.dark]}
    axes.figure.legend(lines, [textwrap.fill(name, NARROW_CHARACTERS) for name in names], **place)


def png(chart: Any) -> bytes:
    """PNG bytes without the software's version, so that equal results give equal bytes."""
    stream = io.BytesIO()
    chart.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def all_looks(draw: Callable[[Look], bytes]) -> Plot:
    """draw(look) for both colour schemes, on screens and phones."""
    light, dark, *narrow = (draw(Look(dark, narrow)) for narrow in (False, True) for dark in (False, True))
    return Plot(light, dark, (narrow[0], narrow[1]))
