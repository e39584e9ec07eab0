"""Draws the table of the demo's seeds in README.md, one panel a seed, for light and dark pages.

python -m tests.benchmarks.evidence.demo_plot      # writes results/demo.png and results/demo-dark.png
"""

from __future__ import annotations

import re
from pathlib import Path

from matplotlib.figure import Figure

from pipelines.report.plots import DARK, INK, LIGHT, MARKERS, PAPER

HERE = Path(__file__).parent
COLUMNS = 3
ROW = re.compile(r"^\|([^|]*)\| (\d) \|((?: \**[\d.]+\** @ [\d.]+ \|){6})", re.MULTILINE)


def curves() -> dict[str, dict[str, list[tuple[float, float]]]]:
    """seed -> method -> (tokens per pass, accuracy in %) by threshold."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    method = ""
    for name, seed, cells in ROW.findall((HERE / "README.md").read_text()):
        method = name.strip() or method
        points = re.findall(r"([\d.]+)\** @ ([\d.]+)", cells)
        found.setdefault(seed, {})[method] = [(float(rate), float(accuracy)) for accuracy, rate in points]
    return found


def draw(dark: bool) -> Figure:
    ink, paper, colours = INK[dark], PAPER[dark], DARK if dark else LIGHT
    seeds = sorted(curves().items())
    rows = -(-len(seeds) // COLUMNS)
    plot = Figure(figsize=(10, 0.8 + 2.7 * rows), dpi=150, facecolor=paper, layout="constrained")
    panels = plot.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    for axes, (seed, methods) in zip(panels.flat, seeds, strict=True):
        axes.set_facecolor(paper)
        axes.set_title(f"seed {seed}", color=ink, fontsize=10)
        axes.grid(color=ink, alpha=0.15, linewidth=0.6)
        axes.tick_params(colors=ink)
        axes.set_ylim(55, 101)
        for side in axes.spines.values():
            side.set_color(ink)
        for index, (method, points) in enumerate(methods.items()):
            look = {"marker": MARKERS[index], "markersize": 4, "color": colours[index], "label": method}
            axes.plot(*zip(*points, strict=True), **look)
    for axes in panels[-1]:
        axes.set_xlabel("tokens per pass", color=ink)
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy, %", color=ink)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    plot.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, labelcolor=ink, fontsize=9)
    return plot


def main() -> None:
    for dark, name in ((False, "demo.png"), (True, "demo-dark.png")):
        draw(dark).savefig(HERE / "results" / name, metadata={"Software": None})


if __name__ == "__main__":
    main()
