"""The page of `rcd report`: runs next to each other, in one plot and a table per method."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape

from pipelines.report import plots
from pipelines.report.comparison import Group, arm_table, differences, mean_curve
from pipelines.report.page import note, page, picture, table
from pipelines.report.plots import Plot

NOTE = (
    "Accuracy in % @ tokens per pass, by confidence threshold. Ratios are tokens per pass against the run's own "
    "baseline at equal accuracy, with 95 % intervals over its problems; AUP is relative to the best accuracy of its "
    "own run. ± is the standard deviation over seeds (n - 1). Between runs nothing is paired."
)


def warnings(groups: Sequence[Group]) -> list[str]:
    """Why some of the runs cannot be held against each other, in words."""
    found = []
    for key, what in (
        ("task", "tasks"),
        ("num_problems", "numbers of problems"),
        ("num_samples", "numbers of samples"),
    ):
        values = {group.label: group.runs[0].results[key] for group in groups}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{label}: {value}" for label, value in values.items())
            found.append(f"the runs have different {what} ({told}); their accuracies do not compare as they stand")
    for group in groups:
        seeds = [run.results["seed"] for run in group.runs]
        for seed in sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            alike = " and ".join(run.label for run in group.runs if run.results["seed"] == seed)
            found.append(f"{alike} are one recipe under one seed, {seed}: their deviation is not that of seeds")
    return found


def html(groups: Sequence[Group], arms: dict[str, str]) -> str:
    """The page: what stands against what, the plot, a table per arm, what differs between the recipes."""
    head, rows = differences(groups)
    several = [f"{group.label} ({len(group.runs)} seeds)" if len(group.runs) > 1 else group.label for group in groups]
    task = " / ".join(dict.fromkeys(group.runs[0].results["task"] for group in groups))
    parts = [
        f"<p>{escape(', '.join(several))}; task {escape(task)}.</p>",
        *(f"<div class=headline><p>{escape(text)}</p></div>" for text in warnings(groups)),
        picture(
            pareto(groups, arms), "Accuracy against tokens per pass, a line per run and arm; tables have the numbers"
        ),
        note(NOTE),
        *(f"<h2>{escape(title)}</h2>{table(*arm_table(groups, name))}" for name, title in arms.items()),
        "<h2>What differs between the recipes</h2>",
        table(head, rows, numbers=False) if rows else "<p>Nothing but names, seeds and resources.</p>",
    ]
    return page(f"Runs compared: {task}", "\n".join(parts))


def pareto(groups: Sequence[Group], arms: dict[str, str]) -> Plot:
    return plots.both(partial(_pareto, groups, arms))


def _pareto(groups: Sequence[Group], arms: dict[str, str], dark: bool) -> bytes:
    """PNG: the mean over seeds with its SD and each seed thinly behind it; one run alone with its 95 % interval."""
    held = [(g, name, title) for name, title in arms.items() for g in groups if any(r.arm(name) for r in g.runs)]
    figure, axes = plots.figure(dark, width=9, height=5.6)
    for i, (group, name, title) in enumerate(held):
        style = {"color": plots.colour(i, dark), "linestyle": plots.line(i)}
        if len(group.runs) > 1:
            for run in group.runs:
                alone = mean_curve([run], name)
                axes.plot([s.rate for s in alone], [s.accuracy for s in alone], alpha=0.3, linewidth=0.8, **style)
        curve = mean_curve(group.runs, name)
        bars = [[s.below for s in curve], [s.above for s in curve]]
        axes.errorbar(
            [s.rate for s in curve], [s.accuracy for s in curve], yerr=bars, marker=plots.marker(i),
            label=f"{group.label}: {title}", markersize=5, linewidth=1.6, elinewidth=0.9, capsize=2, **style,
        )  # fmt: skip
    axes.set_xlabel("tokens per pass (reference passes counted by their FLOPs)")
    axes.set_ylabel("accuracy, %")
    plots.legend(axes, dark)
    return plots.png(figure)
