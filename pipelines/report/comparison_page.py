"""The page of `rcd report`: runs next to each other, in one plot and a table per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.report import plots
from pipelines.report.comparison import Group, differences, graders, mean_curve, method_table
from pipelines.report.plots import Look, Plot
from pipelines.report.render import render

NOTE = (
    "Accuracy in % @ tokens per pass, by confidence threshold. Ratios: tokens per pass divided by those of the run's "
    "own baseline at equal accuracy, with 95 % intervals over its problems. AUP is relative to the best accuracy of "
    "its own run. ± is the standard deviation over seeds (n - 1). Runs are not paired with each other."
)


def html(groups: Sequence[Group], methods: Mapping[str, str]) -> str:
    """The page. methods: name -> title of those to show."""
    labels = [f"{group.label} ({len(group.runs)} seeds)" if len(group.runs) > 1 else group.label for group in groups]
    task = " / ".join(dict.fromkeys(group.runs[0].results["task"] for group in groups))
    return render(
        "comparison.html.j2",
        title=f"Comparison of runs: {task}",
        runs=labels,
        task=task,
        warnings=warnings(groups),
        plot=pareto(groups, methods),
        note=NOTE,
        methods=[(title, method_table(groups, name)) for name, title in methods.items()],
        differences=differences(groups),
        graders=graders(groups),
    )


def warnings(groups: Sequence[Group]) -> list[str]:
    """Reasons why some of the runs cannot be compared."""
    messages = []
    names = {"task": "tasks", "num_problems": "numbers of problems", "num_samples": "numbers of samples"}
    for key, name in names.items():
        values = {group.label: group.runs[0].results[key] for group in groups}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{label}: {value}" for label, value in values.items())
            messages.append(f"the runs have different {name} ({listed}), so their accuracies are not comparable")
    for group in groups:
        seeds = [run.results["seed"] for run in group.runs]
        for seed in sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            labels = " and ".join(run.label for run in group.runs if run.results["seed"] == seed)
            messages.append(
                f"{labels} have the same recipe and the same seed, {seed}: the standard deviation is not over seeds"
            )
    return messages


def pareto(groups: Sequence[Group], methods: Mapping[str, str]) -> Plot:
    """Accuracy against tokens per pass: the mean over seeds with its SD, and each seed as a thin line. A single run has
    its 95 % interval."""
    curves = [
        (g, name, title) for name, title in methods.items() for g in groups if any(r.method(name) for r in g.runs)
    ]

    def draw(look: Look) -> bytes:
        chart, axes = plots.figure(look, width=9, height=5.6)
        for i, (group, name, title) in enumerate(curves):
            if len(group.runs) > 1:
                thin = {"color": plots.colour(i, look.dark), "linestyle": plots.line(i), "alpha": 0.3, "linewidth": 0.8}
                for run in group.runs:
                    points = mean_curve([run], name)
                    axes.plot([p.rate for p in points], [p.accuracy for p in points], **thin)
            points = mean_curve(group.runs, name)
            bars = [[p.bar[side] for p in points] for side in (0, 1)]
            x, y = [p.rate for p in points], [p.accuracy for p in points]
            plots.curve(axes, x, y, i, look.dark, f"{group.label}: {title}", bars)
        axes.set_xlabel("tokens per pass (reference passes counted by their FLOPs)")
        axes.set_ylabel("accuracy, %")
        plots.percent_axis(axes)
        plots.legend(axes, look)
        return plots.png(chart)

    return plots.all_looks(draw)
