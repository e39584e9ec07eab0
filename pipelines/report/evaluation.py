"""How an evaluation is shown: tables for the terminal, plots, and one HTML page that needs no other file.

Everything here reads results.json; the words and the cells of the tables are in report_text.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape

from rich.console import Console
from rich.table import Table

from pipelines.report import plots
from pipelines.report import text as text
from pipelines.report.page import note, page, pairs, picture, table
from pipelines.report.plots import Plot
from pipelines.report.text import Cells, Results

# Plot -> (what is on its x axis, the axis' label, the picture's words).
_PLOTS = {
    "pareto": (
        "tokens_per_pass",
        "tokens per pass (reference passes counted by their FLOPs)",
        "Accuracy against tokens per pass, a line per arm; a table below has the numbers",
    ),
    "throughput": (
        "tokens_per_second",
        "tokens per second",
        "Accuracy against tokens per second, a line per arm; a table below has the numbers",
    ),
}


def print_tables(results: Results, console: Console) -> None:
    """Accuracy @ tokens per pass for every arm and threshold, the comparisons, and what was in effect."""
    head, rows = text.curve_table(results)
    _print(console, (head, rows), title=f"{text.title(results)}: accuracy in % @ tokens per pass")
    console.print(text.costs(results), markup=False, highlight=False)
    if results["comparisons"]:
        head, rows = text.comparison_table(results, "tokens_per_pass")
        # The differences in accuracy are many numbers: they stand in the page.
        _print(
            console,
            (head[:-1], [row[:-1] for row in rows]),
            title="against SeqD, in pairs",
            caption=text.scope(results),
        )
    head, rows = text.differing_settings(results)
    _print(console, (head, [row for row in rows if not row[0].startswith("trained with")]), title="decoding settings")
    shared = ", ".join(f"{name} {value}" for name, value in text.common_settings(results))
    console.print(f"all arms: {shared}", markup=False, highlight=False)
    console.print(f"hardware: {text.hardware(results)}", markup=False, highlight=False)


def _print(console: Console, cells: Cells, title: str, caption: str | None = None) -> None:
    head, rows = cells
    made = Table(*head, title=title, caption=caption)
    for row in rows:
        made.add_row(*row)
    console.print(made)


def plots_of(results: Results) -> dict[str, Plot]:
    """The plots of an evaluation by name: pareto, and throughput where the time was taken. Files are <name>.png."""
    timed = any(p["tokens_per_second"] is not None for arm in results["arms"] for p in arm["curve"])
    return {name: plots.both(partial(plot, results, name)) for name in _PLOTS if timed or name != "throughput"}


def plot(results: Results, name: str, dark: bool = False) -> bytes:
    """PNG: accuracy with its 95 % interval against a speed, a line per arm along the thresholds."""
    speed, label, _ = _PLOTS[name]
    figure, axes = plots.figure(dark)
    for i, arm in enumerate(results["arms"]):
        points = sorted((p for p in arm["curve"] if p[speed] is not None), key=lambda point: point["threshold"])
        y = [100 * p["accuracy"] for p in points]
        spread = [
            [abs(100 * p[end] - v) for p, v in zip(points, y, strict=True)] for end in ("accuracy_low", "accuracy_high")
        ]
        axes.errorbar(
            [p[speed] for p in points], y, yerr=spread, color=plots.colour(i, dark), marker=plots.marker(i),
            linestyle=plots.line(i), label=arm["title"], markersize=5, linewidth=1.6, elinewidth=0.9, capsize=2,
        )  # fmt: skip
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy, %")
    axes.set_title(text.title(results), fontsize=11)
    plots.legend(axes, dark)
    return plots.png(figure)


def html_report(results: Results, plots: Mapping[str, Plot], sections: Sequence[tuple[str, str]] = ()) -> str:
    """One page. plots: as of `plots_of`, others may stand beside them. sections: (heading, ready HTML)."""
    pictures = {name: picture(made, _PLOTS[name][2] if name in _PLOTS else name) for name, made in plots.items()}
    parts = [
        f"<p>{escape(text.measured(results))}</p>",
        _headlines(results),
        pictures.pop("pareto", ""),
        note(text.costs(results)),
        _comparisons(results),
        "<h2>Area under the curve (AUP)</h2>",
        table(*text.aup_table(results)),
        note(_aup_words(results)),
        "<h2>Throughput with its accuracy</h2>",
        pictures.pop("throughput", ""),
        table(*text.throughput_table(results)),
        note(
            f"Tokens per second: of {results.get('decoded_by', 'one actor')}, generated tokens over its seconds of "
            f"decoding. {text.hardware(results)}"
        ),
        *pictures.values(),
        "<h2>Accuracy in % @ tokens per pass, by confidence threshold</h2>",
        table(*text.curve_table(results)),
        _details("Mean passes of an answer, by kind", table(*text.passes_table(results))),
        _details("Accuracy of each sample", table(*text.samples_table(results))) if results["num_samples"] > 1 else "",
        "<h2>Decoding settings</h2>",
        table(*text.differing_settings(results)),
        f"<p>The same in all arms:</p>{pairs(text.common_settings(results))}",
        *(f"<h2>{escape(heading)}</h2>{body}" for heading, body in sections),
        "<h2>How it was measured</h2>",
        f"<p>{escape(text.reproduce(results))}</p>",
        f"<p>{escape(text.hardware(results))}</p>",
        _statistics(results),
    ]
    return page(text.title(results), "\n".join(part for part in parts if part))


def _headlines(results: Results) -> str:
    if not results["comparisons"]:
        return ""
    parts = []
    for subject, sentences in text.headlines(results):
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
        parts.append(f"<p><b>{escape(subject)}</b></p><ul>{items}</ul>")
    words = "More than 1 times the tokens per pass is faster, less than 1 is slower; 95 % intervals in parentheses."
    return f"<div class=headline>{''.join(parts)}{note(words)}</div>"


def _comparisons(results: Results) -> str:
    if not results["comparisons"]:
        return ""
    parts = [
        "<h2>Against the baseline, in pairs</h2>",
        note(text.scope(results)),
        table(*text.comparison_table(results, "tokens_per_pass")),
    ]
    if any(arm["reference_weight"] for arm in results["arms"]):
        parts += [
            "<h3>The same by the paper's measure: reference passes are not counted</h3>",
            table(*text.comparison_table(results, "tokens_per_forward")),
        ]
    return "".join(parts)


def _aup_words(results: Results) -> str:
    found = results["statistics"]["aup"]
    return (
        f"Area under accuracy y (%) against speed ({found['source']}). Points count with the weight "
        f"min(exp(-{found['alpha']:g} (1 - y / y_max)), 1), y_max = {text.percent(found['best_accuracy'])}, and not at "
        f"all where y is more than {found['offset_points']:g} points below that of the slowest point. Its authors take "
        "tokens per forward."
    )


def _statistics(results: Results) -> str:
    found = results["statistics"]
    rows = [[name.replace("_", " "), str(value)] for name, value in found.items() if name != "aup"]
    return table(["", ""], rows, numbers=False)


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
