"""How an evaluation is shown: tables for the terminal, a plot, and one HTML page that needs no other file.

Everything here reads results.json. It says what was measured and how sure that is, in the same words whichever arm is
ahead.
"""

from __future__ import annotations

import base64
import io
import json
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table

# Okabe and Ito's colours, told apart by readers with any colour vision; the first is the baseline's.
_LIGHT = ("#666666", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DARK = ("#b0b0b0", "#56b4e9", "#ff8c42", "#2ec4a0", "#e39ac4", "#f0c040", "#9ad0f5", "#ffffff")
_MARKERS = "os^Dv<>P"
_NOT_CROSSED = "not crossed"


def print_tables(results: dict[str, Any], console: Console) -> None:
    """Accuracy @ tokens per pass for every arm and threshold, then the comparisons with SeqD."""
    by_threshold = Table(
        "threshold", *(arm["title"] for arm in results["arms"]), title=_title(results), caption=_costs(results)
    )
    for row in _curve_rows(results):
        by_threshold.add_row(*row)
    console.print(by_threshold)
    if results["comparisons"]:
        arm, ratio, _ = _comparison_head(results)  # the differences are many numbers: they stand in the page
        table = Table(arm, ratio, title="against SeqD, in pairs", caption=_scope(results))
        for row in _comparison_rows(results):
            table.add_row(*row[:2])
        console.print(table)


def pareto_plot(results: dict[str, Any], dark: bool = False) -> bytes:
    """PNG: accuracy with its 95 % interval against tokens per pass, a line per arm along the thresholds."""
    from matplotlib.figure import Figure

    ink, paper = ("#e6e6e6", "#16181c") if dark else ("#222222", "#ffffff")
    figure = Figure(figsize=(8, 5), dpi=150, facecolor=paper, layout="constrained")
    axes = figure.add_subplot(facecolor=paper)
    for i, arm in enumerate(results["arms"]):
        points = sorted(arm["curve"], key=lambda point: point["threshold"])
        x = [point["tokens_per_pass"] for point in points]
        y = [100 * point["accuracy"] for point in points]
        below = [100 * (point["accuracy"] - point["accuracy_low"]) for point in points]
        above = [100 * (point["accuracy_high"] - point["accuracy"]) for point in points]
        color = (_DARK if dark else _LIGHT)[i % len(_LIGHT)]
        axes.errorbar(
            x, y, yerr=[below, above], color=color, marker=_MARKERS[i % len(_MARKERS)], label=arm["title"],
            markersize=5, linewidth=1.6, elinewidth=0.9, capsize=2,
        )  # fmt: skip
    axes.set_xlabel("tokens per pass (reference passes counted by their cost)", color=ink)
    axes.set_ylabel("accuracy, %", color=ink)
    axes.set_title(_title(results), color=ink, fontsize=11)
    axes.tick_params(colors=ink)
    axes.grid(color=ink, alpha=0.15, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(ink)
    axes.legend(frameon=False, labelcolor=ink, fontsize=9)
    stream = io.BytesIO()
    # No software version inside: equal results give equal bytes.
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def html_report(results: dict[str, Any], light: bytes, dark: bytes) -> str:
    """One page: the plot in both schemes, the tables, the settings."""
    comparisons = ""
    if results["comparisons"]:
        sentences = "".join(f"<li>{escape(text)}</li>" for text in _sentences(results))
        comparisons = (
            f"<h2>Against SeqD</h2><ul>{sentences}</ul>"
            f"{_html_table(_comparison_head(results), _comparison_rows(results))}"
            f"<p class=note>{escape(_scope(results))}</p>"
        )
    settings = {
        "statistics": results["statistics"],
        "arms": [{key: arm[key] for key in ("name", "model", "trained_with", "decode")} for arm in results["arms"]],
    }
    return _PAGE.format(
        title=escape(_title(results)),
        light=base64.b64encode(light).decode(),
        dark=base64.b64encode(dark).decode(),
        measured=escape(_measured(results)),
        curves=_html_table(["threshold", *(arm["title"] for arm in results["arms"])], _curve_rows(results)),
        costs=escape(_costs(results)),
        passes=_html_table(_PASSES_HEAD, _passes_rows(results)),
        comparisons=comparisons,
        settings=escape(json.dumps(settings, indent=2, ensure_ascii=False)),
    )


# -- words


def _title(results: dict[str, Any]) -> str:
    return f"{results['recipe']}: {results['task']}, {results['num_problems']} held-out problems"


def _measured(results: dict[str, Any]) -> str:
    return (
        f"{results['num_problems']} held-out problems of the task {results['task']}, each decoded by every arm at "
        "every threshold. Bars in the plot are 95 % intervals of the accuracy (Wilson); results.json has the numbers."
    )


def _costs(results: dict[str, Any]) -> str:
    weights = {arm["reference_weight"] for arm in results["arms"] if arm["reference_weight"]}
    text = "accuracy in % @ tokens per pass; passes that only fill a cache are not counted"
    if weights:
        cost = " or ".join(f"{weight:.2f}" for weight in sorted(weights))
        text += f", a reference pass counts as {cost} of a target pass (ratio of parameters)"
    return text


def _scope(results: dict[str, Any]) -> str:
    return (
        f"95 % intervals, paired bootstrap over {results['num_problems']} problems. One training run per model: the "
        "intervals cover the choice of problems, not the spread between training runs."
    )


def _sentences(results: dict[str, Any]) -> list[str]:
    titles = _titles(results)
    sentences = []
    for c in results["comparisons"]:
        arm, baseline, level = titles[c["arm"]], titles[c["baseline"]], f"{100 * c['accuracy_level']:.0f} %"
        if c["ratio"]["value"] is None:
            text = f"{arm}: the two curves do not both cross {level} accuracy at these thresholds; there is no ratio."
        else:
            text = f"{arm}: at {level} accuracy {_ratio(c['ratio'])} times the tokens per pass of {baseline}."
        sentences.append(text)
    return sentences


# -- tables


def _titles(results: dict[str, Any]) -> dict[str, str]:
    return {arm["name"]: arm["title"] for arm in results["arms"]}


def _curve_rows(results: dict[str, Any]) -> list[list[str]]:
    rows = []
    for threshold in results["thresholds"]:
        points = [next(p for p in arm["curve"] if p["threshold"] == threshold) for arm in results["arms"]]
        rows.append([f"{threshold:g}", *(f"{100 * p['accuracy']:.1f} @ {p['tokens_per_pass']:.2f}" for p in points)])
    return rows


_PASSES_HEAD = ["arm", "threshold", "tokens", "denoise", "reference", "prefill", "store", "tokens per denoise pass"]


def _passes_rows(results: dict[str, Any]) -> list[list[str]]:
    kinds = ("mean_tokens", "mean_denoise", "mean_reference", "mean_prefill", "mean_store", "tokens_per_forward")
    return [
        [arm["title"], f"{point['threshold']:g}", *(f"{point[kind]:.2f}" for kind in kinds)]
        for arm in results["arms"]
        for point in arm["curve"]
    ]


def _comparison_head(results: dict[str, Any]) -> list[str]:
    level = f"{100 * results['comparisons'][0]['accuracy_level']:.0f} %"
    return ["arm", f"tokens per pass at {level}, ratio", "difference in accuracy (points) at equal tokens per pass"]


def _comparison_rows(results: dict[str, Any]) -> list[list[str]]:
    titles = _titles(results)
    return [
        [
            titles[c["arm"]],
            _NOT_CROSSED if c["ratio"]["value"] is None else _ratio(c["ratio"]),
            "\n".join(f"{g['tokens_per_pass']:.2f}: {_points(g['difference'])}" for g in c["gains"])
            or "no common range",
        ]
        for c in results["comparisons"]
    ]


def _ratio(estimate: dict[str, Any]) -> str:
    return f"{estimate['value']:.2f}{_interval(estimate, 1, '.2f')}"


def _points(estimate: dict[str, Any]) -> str:
    return "none" if estimate["value"] is None else f"{100 * estimate['value']:+.1f}{_interval(estimate, 100, '+.1f')}"


def _interval(estimate: dict[str, Any], scale: float, form: str) -> str:
    if estimate["low"] is None:
        return " (no interval: not reached in enough resamples)"
    return f" ({scale * estimate['low']:{form}} to {scale * estimate['high']:{form}})"


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --ink: #222; --soft: #666; --line: #d8d8d8; --paper: #fff; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e6e6; --soft: #a0a0a0; --line: #3a3d42; --paper: #16181c; }}
}}
body {{ color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
img {{ max-width: 100%; height: auto; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; vertical-align: top; padding: 0.3rem 0.9rem 0.3rem 0;
  border-bottom: 1px solid var(--line); white-space: pre-line; }}
.note {{ color: var(--soft); font-size: 0.9rem; }}
pre {{ overflow-x: auto; font-size: 0.8rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{measured}</p>
<picture>
<source srcset="data:image/png;base64,{dark}" media="(prefers-color-scheme: dark)">
<img src="data:image/png;base64,{light}"
alt="Accuracy against tokens per pass, a line per arm; the table below has the numbers">
</picture>
<h2>Accuracy @ tokens per pass, by confidence threshold</h2>
{curves}
<p class="note">{costs}</p>
{comparisons}
<details><summary>Mean passes of a problem, by kind</summary>{passes}</details>
<details><summary>Settings</summary><pre>{settings}</pre></details>
</body>
</html>
"""
