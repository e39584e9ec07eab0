"""Shows results.json: tables on the terminal, plots, and one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from rich.console import Console

from pipelines.report import costs, plots, prediction, summary, text
from pipelines.report.markdown import markdown
from pipelines.report.plots import Look, Plot
from pipelines.report.render import print_table, render
from pipelines.report.text import Results
from rcd_core.io import storage

# Plot -> key and label of its x axis.
_SPEEDS = {
    "pareto": ("tokens_per_pass", "tokens per pass (reference passes counted by their FLOPs)"),
    "throughput": ("tokens_per_second", "tokens per second"),
}


def write_evaluation(directory: str, results: Results, reference_failures: int | None = None) -> None:
    """Write results.json, the plots, report.html and report.md. reference_failures: as in `html_report`. The plots of a
    further task have its name."""
    figures = [plots_of(one) for one in summary.evaluations(results)]
    page = html_report(results, figures, reference_failures)
    storage.write_json(storage.join(directory, "results.json"), results)
    for suffix, shown in zip(["", *(f"-{name}" for name in results.get("tasks", {}))], figures, strict=True):
        for name, figure in shown.items():
            storage.write_bytes(storage.join(directory, f"{name}{suffix}.png"), figure.light)
    storage.write_bytes(storage.join(directory, "report.html"), page.encode())
    storage.write_bytes(storage.join(directory, "report.md"), markdown(results).encode())


def print_tables(results: Results, console: Console) -> None:
    """Print, of every task, accuracy @ tokens per pass by method and threshold, the comparisons and the settings in
    effect; at the end what training cost, and the verdicts."""
    for one in summary.evaluations(results):
        _print_task(one, console)
    if results.get("costs"):
        print_table(console, costs.by_method(results), "training")
    for name, sentence in summary.verdicts(results):
        line = f"{name}: {sentence}" if name else sentence
        console.print(line, style="bold", soft_wrap=True, markup=False, highlight=False)


def _print_task(results: Results, console: Console) -> None:
    title = f"{text.title(results)}: accuracy in % @ tokens per pass"
    print_table(console, text.curve_table(results), title)
    console.print(text.costs(results), markup=False, highlight=False)
    if results["comparisons"]:
        head, rows = text.comparison_table(results, "tokens_per_pass")
        # The accuracy differences take much room: they are in the page only.
        cells = head[:-1], [row[:-1] for row in rows]
        print_table(console, cells, "paired comparison with SeqD", text.scope(results))
    head, rows = text.differing_settings(results)
    print_table(console, (head, [row for row in rows if not row[0].startswith("trained with")]), "decoding settings")
    shared = ", ".join(f"{name} {value}" for name, value in text.common_settings(results))
    console.print(f"all methods: {shared}", markup=False, highlight=False)
    console.print(f"hardware: {text.hardware(results)}", markup=False, highlight=False)
    for line in (text.grader(results), text.settings_file_line(results), prediction.line(results)):
        if line:
            console.print(line, soft_wrap=True, markup=False, highlight=False)


def plots_of(results: Results) -> dict[str, Plot]:
    """Plots by name: pareto, and throughput if the time was measured."""
    timed = any(p["tokens_per_second"] is not None for method in results["arms"] for p in method["curve"])
    return {name: plots.all_looks(partial(plot, results, name)) for name in _SPEEDS if timed or name != "throughput"}


def plot(results: Results, name: str, look: Look = plots.SCREEN) -> bytes:
    """PNG: accuracy with its 95 % interval against a speed, a line per method along the thresholds."""
    speed, label = _SPEEDS[name]
    figure, axes = plots.figure(look)
    for i, method in enumerate(results["arms"]):
        points = sorted((p for p in method["curve"] if p[speed] is not None), key=lambda point: point["threshold"])
        y = [100 * p["accuracy"] for p in points]
        bars = [
            [abs(100 * p[end] - v) for p, v in zip(points, y, strict=True)] for end in ("accuracy_low", "accuracy_high")
        ]
        plots.curve(axes, [p[speed] for p in points], y, i, look.dark, method["title"], bars)
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy, %")
    axes.set_title(text.title(results), fontsize=11)
    plots.percent_axis(axes)
    plots.legend(axes, look)
    return plots.png(figure)


def html_report(results: Results, figures: Sequence[Mapping[str, Plot]], reference_failures: int | None = None) -> str:
    """The page. figures: from `plots_of`, for every task. reference_failures: blocks for which an endpoint's reference
    did not answer; None if it made no reference pass."""
    return render(
        "evaluation.html.j2",
        title=summary.page_title(results),
        results=results,
        text=text,
        summary=summary,
        costs=costs,
        prediction=prediction,
        plots=figures,
        reference_failures=reference_failures,
    )
