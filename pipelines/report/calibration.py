"""How a calibration is shown: plots and tables of calibration.json, as sections of a page or as a page of their own.

sections({"target": found, "baseline": diagnosed})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from pipelines.report.page import note, page, picture, table
from pipelines.report.plots import Plot, both, colour, figure, legend, line, marker, png
from rcd_core.calibration.distance import LEAST_POSITIONS

Found = Mapping[str, Any]  # of one model
Calibration = Mapping[str, Found]  # stage or checkpoint -> what was found
_SHOWN_KS = ("1", "5", "10")  # lines of the plot; the table has all


def sections(calibration: Calibration) -> list[tuple[str, str]]:
    """(heading, ready HTML) of every part that there are numbers for."""
    calibrated = {name: found for name, found in calibration.items() if "residual_temperature" in found}
    parts = [
        ("Calibration of T_res", _temperatures(calibrated)),
        ("Alpha in training and in decoding", "".join(_alphas(name, found) for name, found in calibrated.items())),
        ("Proxy residuals against the reference's", _agreement(calibrated)),
        ("What discarded predictions knew", _discarded(calibration)),
    ]
    return [(heading, html) for heading, html in parts if html]


def html_page(title: str, calibration: Calibration) -> str:
    return page(title, "".join(f"<h2>{escape(heading)}</h2>{html}" for heading, html in sections(calibration)))


def summary_line(found: Found) -> str:
    """T_res of one target in words."""
    if found["nothing_to_match"]:
        return f"T_res {found['residual_temperature']:g}, nothing to match: {found['nothing_to_match']}"
    return (
        f"T_res {found['residual_temperature']:g}: alpha is {found['distance']:.4f} from the reference's, "
        f"{found['distance_uncalibrated']:.4f} at T_res 1 ({found['num_problems']} held-out problems)"
    )


# -- T_res


def _temperatures(calibrated: Calibration) -> str:
    if not calibrated:
        return ""
    searched = {name: found for name, found in calibrated.items() if not found["nothing_to_match"]}
    said = "".join(f"<li>{escape(f'{_title(name)}: {summary_line(f)}')}</li>" for name, f in calibrated.items())
    html = f"<ul>{said}</ul>"
    if not searched:
        return html
    html += picture(_curves(searched, _draw_distance), "Distance of alpha from the reference's against T_res")
    if any(trial["accuracy"] is not None for found in searched.values() for trial in found["trials"]):
        html += picture(_curves(searched, _draw_accuracy), "Accuracy on the held-out problems against T_res")
    head = ["T_res", "distance on decoding's inputs", "from training's", "accuracy, %", "95 %", "tokens per forward"]
    for name, found in searched.items():
        rows = [_trial_row(trial) for trial in found["trials"]]
        html += f"<details><summary>{escape(_title(name))}: all T_res</summary>{table(head, rows)}</details>"
    first = next(iter(searched.values()))
    at = f"confidence threshold {first['decode']['confidence_threshold']:g}, start {first['decode']['start']}"
    return html + note(
        f"Distance: {first['measure']}; match: {first['match']}. Problems of the training split that no model was "
        f"trained on, {at}. Bars: 95 % (Wilson). T_res is chosen by the distance alone; rings mark it."
    )


def _trial_row(trial: Mapping[str, Any]) -> list[str]:
    accuracy = trial["accuracy"] is not None
    return [
        f"{trial['residual_temperature']:g}",
        f"{trial['distance_decoding']:.4f}",
        f"{trial['distance_training']:.4f}",
        f"{100 * trial['accuracy']:.1f}" if accuracy else "not graded",
        f"{100 * trial['accuracy_low']:.1f} to {100 * trial['accuracy_high']:.1f}" if accuracy else "",
        f"{trial['tokens_per_forward']:.2f}",
    ]


def _curves(searched: Calibration, draw: Callable[[Any, Sequence[Any], Found, dict[str, Any], bool], None]) -> Plot:
    """A line per target over T_res, which is logarithmic."""

    def drawn(dark: bool) -> bytes:
        made, axes = figure(dark, height=3.6)
        for i, (name, found) in enumerate(searched.items(), start=1):  # the first colour is the baseline's
            style = {"color": colour(i, dark), "marker": marker(i), "linestyle": line(i), "label": _title(name)}
            draw(axes, found["trials"], found, style, dark)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("T_res")
        legend(axes, dark)
        return png(made)

    return both(drawn)


def _draw_distance(axes: Any, trials: Sequence[Any], found: Found, style: dict[str, Any], dark: bool) -> None:
    axes.plot([t["residual_temperature"] for t in trials], [t["distance"] for t in trials], markersize=4, **style)
    _ring(axes, found["residual_temperature"], found["distance"], style["color"])
    axes.set_ylabel("distance of alpha")
    axes.set_ylim(bottom=0)


def _draw_accuracy(axes: Any, trials: Sequence[Any], found: Found, style: dict[str, Any], dark: bool) -> None:
    trials = [t for t in trials if t["accuracy"] is not None]
    y = [100 * t["accuracy"] for t in trials]
    bars = [
        [100 * (t["accuracy"] - t["accuracy_low"]) for t in trials],
        [100 * (t["accuracy_high"] - t["accuracy"]) for t in trials],
    ]
    x = [t["residual_temperature"] for t in trials]
    axes.errorbar(x, y, yerr=bars, markersize=4, capsize=2, elinewidth=0.9, **style)
    chosen = x.index(found["residual_temperature"]) if found["residual_temperature"] in x else None
    if chosen is not None:
        _ring(axes, x[chosen], y[chosen], style["color"])
    axes.set_ylabel("accuracy, %")


def _ring(axes: Any, x: float, y: float, color: str) -> None:
    axes.plot(x, y, "o", markersize=12, fillstyle="none", color=color)


# -- alpha


def _alphas(name: str, found: Found) -> str:
    alphas, t_res = found["alphas"], found["residual_temperature"]
    labels = {
        "reference": "reference, on decoding's inputs",
        "training": "reference, in training",
        "before": "self-loop, T_res 1",
        "after": f"self-loop, T_res {t_res:g}",
    }
    if t_res == 1.0:
        del labels["after"]
    shown = {side: label for side, label in labels.items() if side in alphas["histograms"]}

    def histogram(dark: bool) -> bytes:
        made, axes = figure(dark, height=3.4)
        for i, (side, label) in enumerate(shown.items()):
            fill = {"fill": True, "alpha": 0.35} if side == "reference" else {"linewidth": 1.8}
            axes.stairs(alphas["histograms"][side], alphas["edges"], color=colour(i, dark), label=label, **fill)
        axes.set_xlabel("alpha")
        axes.set_ylabel("share of residuals")
        legend(axes, dark)
        return png(made)

    edges = alphas["masked_share_edges"]
    rows = [
        [f"{100 * edges[i]:.0f} to {100 * edges[i + 1]:.0f} %"]
        + [_number(alphas["mean_by_masked_share"][side][i], ".3f") for side in shown]
        + [f"{alphas['positions_by_masked_share'][side][i]:,}" for side in shown]
        for i in range(len(edges) - 1)
    ]
    head = ["still masked", *(f"{what}: {label}" for what in ("mean alpha", "residuals") for label in shown.values())]
    return (
        f"<h3>{escape(_title(name))}</h3>"
        + picture(both(histogram), "Histograms of alpha of the reference and of the self-loop")
        + f"<details><summary>By masking ratio</summary>{table(head, rows)}</details>"
        + note(
            "Weighted to the masking ratios that decoding at T_res 1 passes through. In training: on examples under "
            "its noise. On decoding's inputs: on those that the calibrated target reaches, where the masked positions "
            "are the uncertain ones."
        )
    )


# -- agreement and staleness


def _agreement(calibrated: Calibration) -> str:
    found = {name: f for name, f in calibrated.items() if "agreement" in f}
    stale = {name: f for name, f in calibrated.items() if "staleness" in f}
    html = ""
    if found:
        html += picture(
            _by_progress({n: f["agreement"]["by_progress"] for n, f in found.items()}, _KLS),
            "KL divergences between reference and self residuals by progress",
        )
        for name, one in found.items():
            by_entropy, by_progress = one["agreement"]["by_entropy"], one["agreement"]["by_progress"]
            html += f"<h3>{escape(_title(name))}, by entropy of the reference's prediction</h3>"
            html += table(["nats", *_AGREEMENT_HEAD], _agreement_rows(by_entropy, _ranges(by_entropy["edges"])))
            rows = _agreement_rows(by_progress, _percents(by_progress["edges"]))
            inner = table(["committed", *_AGREEMENT_HEAD], rows)
            html += f"<details><summary>By progress</summary>{inner}</details>"
        html += note(
            "Nats, means over the predictions that are discarded. At every pass of decoding the target's prediction, "
            "which becomes the next residual, is compared with the reference's on the same partly decoded input. "
            f"The plots leave out points of fewer than {LEAST_POSITIONS} predictions."
        )
    if stale:
        html += "<h3>Staleness</h3>" + picture(
            _by_progress({n: f["staleness"] for n, f in stale.items()}, _STALENESS),
            "Divergence between a residual and the target's next prediction, by progress",
        )
        html += note("A residual is one pass old when it is read: here against the prediction this pass makes itself.")
    return html


_KLS = {"kl_reference_self": "KL(reference ‖ self)", "kl_self_reference": "KL(self ‖ reference)"}
_STALENESS = {"kl_fresh_stale": "KL(fresh ‖ stale)", "js": "JS"}
_AGREEMENT_HEAD = [*_KLS.values(), "JS", "same top-1, %", "alpha: reference", "alpha: self", "predictions"]


def _agreement_rows(means: Mapping[str, Any], labels: Sequence[str]) -> list[list[str]]:
    rows = []
    for i, label in enumerate(labels):
        if not means["positions"][i]:
            continue
        same = means["same_top1"][i]
        rows.append(
            [label]
            + [_number(means[name][i], ".3f") for name in (*_KLS, "js")]
            + [_number(None if same is None else 100 * same, ".1f")]
            + [_number(means[name][i], ".3f") for name in ("alpha_reference", "alpha_self")]
            + [f"{means['positions'][i]:,}"]
        )
    return rows


def _by_progress(means: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> Plot:
    """Lines over progress: a colour per target, a style per measure."""

    def drawn(dark: bool) -> bytes:
        made, axes = figure(dark, height=3.4)
        for i, (target, columns) in enumerate(means.items(), start=1):
            for style, (name, label) in zip(("-", "--"), names.items(), strict=False):
                points = _points(columns["edges"], columns[name], columns["positions"])
                axes.plot(*points, style, color=colour(i, dark), marker=marker(i), markersize=4,
                          label=f"{label}, {_title(target)}")  # fmt: skip
        axes.set_xlabel("tokens committed, %")
        axes.set_ylabel("nats")
        axes.set_ylim(bottom=0)
        legend(axes, dark)
        return png(made)

    return both(drawn)


# -- discarded predictions


def _discarded(calibration: Calibration) -> str:
    found = {name: f["discarded"] for name, f in calibration.items() if "discarded" in f}
    if not found:
        return ""

    def drawn(dark: bool) -> bytes:
        made, axes = figure(dark, height=4.0)
        for i, (name, one) in enumerate(found.items()):
            number = 0 if name.startswith("baseline") else i + 1
            for style, k in zip(("-", "--", ":"), _SHOWN_KS, strict=True):
                if k in one["share"]:
                    x, y = _points(one["progress_edges"], one["share"][k], one["predictions"])
                    axes.plot(x, [100 * v for v in y], style, color=colour(number, dark), marker=marker(number),
                              markersize=4, label=f"top {k}, {_title(name)}")  # fmt: skip
        axes.set_xlabel("tokens committed, %")
        axes.set_ylabel("final token among them, %")
        axes.set_ylim(0, 103)
        legend(axes, dark, ncols=min(3, len(found)))
        return png(made)

    ks = list(next(iter(found.values()))["overall"])
    rows = [
        [_title(name), *(_number(None if v is None else 100 * v, ".1f") for v in one["overall"].values())]
        + [f"{sum(one['predictions']):,}"]
        for name, one in found.items()
    ]
    return (
        picture(both(drawn), "Share of discarded predictions that held the final token, by progress")
        + table(["%", *(f"top {k}" for k in ks), "discarded predictions"], rows)
        + note(
            "Of the predictions that a pass throws away: was the token that the position gets in the end among their k "
            "most probable ones? (The paper's Fig. 2.)"
        )
    )


# -- words


def _title(name: str) -> str:
    for prefix, title in (("target", "RCD"), ("baseline", "SeqD")):
        if name == prefix or name.startswith(prefix + "-"):
            return f"{title} {name.removeprefix(prefix).strip('-')}".strip()
    return name


def _points(
    edges: Sequence[float], values: Sequence[float | None], counts: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Middles of the bins in percent, and the values, of bins that hold enough."""
    bins = zip(edges, edges[1:], values, counts, strict=False)
    pairs = [(50 * (a + b), v) for a, b, v, count in bins if v is not None and count >= LEAST_POSITIONS]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _ranges(edges: Sequence[float]) -> list[str]:
    return [f"{a:g} to {b:g}" for a, b in zip(edges, edges[1:], strict=False)] + [f"above {edges[-1]:g}"]


def _percents(edges: Sequence[float]) -> list[str]:
    return [f"{100 * a:.0f} to {100 * b:.0f} %" for a, b in zip(edges, edges[1:], strict=False)]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
