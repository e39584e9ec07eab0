"""Shows calibration.json: plots and tables, on a page of their own or as sections of an evaluation's page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.report.plots import Look, Plot, all_looks, colour, curve, figure, legend, marker, percent_axis, png
from pipelines.report.render import render
from pipelines.report.text import Cells
from rcd_core.calibration.distance import MIN_POSITIONS

Result = Mapping[str, Any]  # of one model
Calibration = Mapping[str, Result]  # stage or checkpoint -> its result
_SHOWN_KS = ("1", "5", "10")  # lines of the plot; the table has all


def html_page(title: str, calibration: Calibration) -> str:
    return render("calibration.html.j2", title=title, calibration=view(calibration))


def view(calibration: Calibration) -> dict[str, Any]:
    """The values of calibration_sections.html.j2; a section without numbers is empty or None."""
    calibrated = {name: result for name, result in calibration.items() if "residual_temperature" in result}
    stale = {name: result["staleness"] for name, result in calibrated.items() if "staleness" in result}
    return {
        "temperatures": _temperatures(calibrated) if calibrated else None,
        "alphas": [(_title(name), *_alphas(result)) for name, result in calibrated.items()],
        "agreement": _agreement({n: r["agreement"] for n, r in calibrated.items() if "agreement" in r}),
        "staleness": _by_progress(stale, {"kl_fresh_stale": "KL(fresh ‖ stale)", "js": "JS"}) if stale else None,
        "discarded": _discarded({n: r["discarded"] for n, r in calibration.items() if "discarded" in r}),
        "least_positions": MIN_POSITIONS,
    }


def summary_line(result: Result) -> str:
    """T_res of one target in words."""
    if result["nothing_to_match"]:
        return f"T_res {result['residual_temperature']:g}, nothing to match: {result['nothing_to_match']}"
    return (
        f"T_res {result['residual_temperature']:g}: alpha is {result['distance']:.4f} from the reference's, "
        f"{result['distance_uncalibrated']:.4f} at T_res 1 ({result['num_problems']} held-out problems)"
    )


def summary_lines(calibration: Calibration) -> list[str]:
    """T_res of every target in words, for the report of an evaluation."""
    return [f"{_title(n)}: {summary_line(r)}" for n, r in calibration.items() if "residual_temperature" in r]


# -- T_res


def _temperatures(calibrated: Calibration) -> dict[str, Any]:
    searched = {name: result for name, result in calibrated.items() if not result["nothing_to_match"]}
    summaries = summary_lines(calibrated)
    if not searched:
        return {"summaries": summaries, "distance": None}
    first = next(iter(searched.values()))
    graded = any(trial["accuracy"] is not None for result in searched.values() for trial in result["trials"])
    head = ["T_res", "distance, decoding inputs", "training inputs", "accuracy, %", "95 %", "tokens per forward"]
    return {
        "summaries": summaries,
        "distance": _curves(searched, "distance of alpha", _distance),
        "accuracy": _curves(searched, "accuracy, %", _accuracy) if graded else None,
        "tables": [(_title(n), (head, [_trial_row(t) for t in r["trials"]])) for n, r in searched.items()],
        "measure": first["measure"],
        "match": first["match"],
        "threshold": first["decode"]["confidence_threshold"],
        "start": first["decode"]["start"],
    }


def _trial_row(trial: Result) -> list[str]:
    graded = trial["accuracy"] is not None
    return [
        f"{trial['residual_temperature']:g}",
        f"{trial['distance_decoding']:.4f}",
        f"{trial['distance_training']:.4f}",
        f"{100 * trial['accuracy']:.1f}" if graded else "not graded",
        f"{100 * trial['accuracy_low']:.1f} to {100 * trial['accuracy_high']:.1f}" if graded else "",
        f"{trial['tokens_per_forward']:.2f}",
    ]


def _distance(trial: Result) -> tuple[float, float, float]:
    return trial["distance"], 0.0, 0.0


def _accuracy(trial: Result) -> tuple[float, float, float] | None:
    """Percent, and its distances to both ends of the interval."""
    if trial["accuracy"] is None:
        return None
    value, low, high = (100 * trial[name] for name in ("accuracy", "accuracy_low", "accuracy_high"))
    return value, value - low, high - value


def _curves(searched: Calibration, label: str, point: Callable[[Result], tuple[float, float, float] | None]) -> Plot:
    """A line per target over T_res, a ring around the chosen one. point: a trial -> value, bar below, bar above."""

    def draw(look: Look) -> bytes:
        chart, axes = figure(look, height=3.6)
        for i, (name, result) in enumerate(searched.items(), start=1):  # colour 0 is the baseline's
            points = {t["residual_temperature"]: p for t in result["trials"] if (p := point(t)) is not None}
            values, below, above = zip(*points.values(), strict=True) if points else ((), (), ())
            bars = (below, above) if any(below) or any(above) else None
            curve(axes, list(points), values, i, look.dark, _title(name), bars)
            if (chosen := points.get(result["residual_temperature"])) is not None:
                ring = {"markersize": 12, "fillstyle": "none", "color": colour(i, look.dark)}
                axes.plot(result["residual_temperature"], chosen[0], "o", **ring)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("T_res")
        axes.set_ylabel(label)
        if label.startswith("distance"):
            axes.set_ylim(bottom=0)
        else:
            percent_axis(axes)
        legend(axes, look)
        return png(chart)

    return all_looks(draw)


# -- alpha


def _alphas(result: Result) -> tuple[Plot, Cells]:
    """Histograms of alpha, and its means by masking ratio."""
    alphas, t_res = result["alphas"], result["residual_temperature"]
    labels = {
        "reference": "reference, decoding inputs",
        "training": "reference, in training",
        "before": "self-loop, T_res 1",
        "after": f"self-loop, T_res {t_res:g}",
    }
    if t_res == 1.0:
        del labels["after"]
    shown = {side: label for side, label in labels.items() if side in alphas["histograms"]}

    def histogram(look: Look) -> bytes:
        chart, axes = figure(look, height=3.4)
        for i, (side, label) in enumerate(shown.items()):
            fill = {"fill": True, "alpha": 0.35} if side == "reference" else {"linewidth": 1.8}
            axes.stairs(alphas["histograms"][side], alphas["edges"], color=colour(i, look.dark), label=label, **fill)
        axes.set_xlabel("alpha")
        axes.set_ylabel("share of residuals")
        legend(axes, look)
        return png(chart)

    rows = [
        [label]
        + [_number(alphas["mean_by_masked_share"][side][i], ".3f") for side in shown]
        + [f"{alphas['positions_by_masked_share'][side][i]:,}" for side in shown]
        for i, label in enumerate(_percents(alphas["masked_share_edges"]))
    ]
    head = ["still masked", *(f"{what}: {label}" for what in ("mean alpha", "residuals") for label in shown.values())]
    return all_looks(histogram), (head, rows)


# -- agreement and staleness

_KLS = {"kl_reference_self": "KL(reference ‖ self)", "kl_self_reference": "KL(self ‖ reference)"}


def _agreement(agreements: Calibration) -> dict[str, Any] | None:
    if not agreements:
        return None
    tables = []
    for name, means in agreements.items():
        edges = means["by_entropy"]["edges"]
        ranges = [f"{a:g} to {b:g}" for a, b in zip(edges, edges[1:], strict=False)] + [f"above {edges[-1]:g}"]
        by_entropy = _agreement_table("nats", means["by_entropy"], ranges)
        by_progress = _agreement_table("committed", means["by_progress"], _percents(means["by_progress"]["edges"]))
        tables.append((_title(name), by_entropy, by_progress))
    plot = _by_progress({name: means["by_progress"] for name, means in agreements.items()}, _KLS)
    return {"plot": plot, "tables": tables}


def _agreement_table(first: str, means: Result, labels: Sequence[str]) -> Cells:
    head = [first, *_KLS.values(), "JS", "same top-1, %", "alpha: reference", "alpha: self", "predictions"]
    rows = [
        [label]
        + [_number(means[name][i], ".3f") for name in (*_KLS, "js")]
        + [_percent(means["same_top1"][i])]
        + [_number(means[name][i], ".3f") for name in ("alpha_reference", "alpha_self")]
        + [f"{means['positions'][i]:,}"]
        for i, label in enumerate(labels)
        if means["positions"][i]
    ]
    return head, rows


def _by_progress(means: Calibration, names: Mapping[str, str]) -> Plot:
    """Lines over progress: a colour per target, a style per measure."""
    lines = [
        (i, style, _points(columns["edges"], columns[name], columns["positions"]), f"{label}, {_title(target)}")
        for i, (target, columns) in enumerate(means.items(), start=1)
        for style, (name, label) in zip(("-", "--"), names.items(), strict=True)
    ]
    return _progress_plot(lines, "nats", {"bottom": 0}, height=3.4)


def _progress_plot(lines: Sequence[Any], label: str, limits: Mapping[str, float], height: float, **place: Any) -> Plot:
    """lines: (colour index, line style, (x, y), label)."""

    def draw(look: Look) -> bytes:
        chart, axes = figure(look, height=height)
        for i, style, (x, y), name in lines:
            axes.plot(x, y, style, color=colour(i, look.dark), marker=marker(i), markersize=4, label=name)
        axes.set_xlabel("tokens committed, %")
        axes.set_ylabel(label)
        axes.set_ylim(**limits)
        legend(axes, look, **place)
        return png(chart)

    return all_looks(draw)


# -- discarded predictions


def _discarded(results: Calibration) -> dict[str, Any] | None:
    if not results:
        return None
    lines = []
    for i, (name, result) in enumerate(results.items(), start=1):
        for style, k in zip(("-", "--", ":"), _SHOWN_KS, strict=True):
            if k in result["share"]:
                x, y = _points(result["progress_edges"], result["share"][k], result["predictions"])
                index = 0 if name.startswith("baseline") else i
                lines.append((index, style, (x, [100 * v for v in y]), f"top {k}, {_title(name)}"))
    limits = {"bottom": 0, "top": 103}
    plot = _progress_plot(lines, "final token among them, %", limits, height=4.0, ncols=min(3, len(results)))
    head = ["%", *(f"top {k}" for k in next(iter(results.values()))["overall"]), "discarded predictions"]
    rows = [
        [_title(name), *map(_percent, result["overall"].values()), f"{sum(result['predictions']):,}"]
        for name, result in results.items()
    ]
    return {"plot": plot, "cells": (head, rows)}


# -- words


def _title(name: str) -> str:
    for prefix, title in (("target", "RCD"), ("baseline", "SeqD")):
        if name == prefix or name.startswith(prefix + "-"):
            return f"{title} {name.removeprefix(prefix).strip('-')}".strip()
    return name


def _points(
    edges: Sequence[float], values: Sequence[float | None], counts: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Middles in percent and values of the bins with at least MIN_POSITIONS predictions."""
    bins = zip(edges, edges[1:], values, counts, strict=False)
    pairs = [(50 * (a + b), v) for a, b, v, count in bins if v is not None and count >= MIN_POSITIONS]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _percents(edges: Sequence[float]) -> list[str]:
    return [f"{100 * a:.0f} to {100 * b:.0f} %" for a, b in zip(edges, edges[1:], strict=False)]


def _percent(share: float | None) -> str:
    return _number(None if share is None else 100 * share, ".1f")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
