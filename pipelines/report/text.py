"""Sentences and table cells that describe results.json, for the terminal and for the page.

The sentences are the same whichever method is ahead. Cells are a head and rows of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Results = dict[str, Any]
Cells = tuple[list[str], list[list[str]]]
MEASURE_NAMES = {"tokens_per_pass": "tokens per pass", "tokens_per_forward": "tokens per forward"}
_PASSES = ("denoise", "reference", "prefill", "store")


# -- sentences


def title(results: Results) -> str:
    samples = f", {results['num_samples']} samples each" if results["num_samples"] > 1 else ""
    return f"{results['recipe']}: {results['task']}, {results['num_problems']} problems{samples}"


def measured(results: Results) -> str:
    seeds = ", each sample with its own seed" if results["num_samples"] > 1 else ""
    return (
        f"{results['num_problems']} held-out problems of the task {results['task']}. Every method decodes each of them "
        f"at every threshold{seeds}. Accuracies have intervals ({results['statistics']['accuracy_interval']})."
    )


def costs(results: Results) -> str:
    """How passes are counted."""
    text = "Tokens per pass: generated tokens per pass that chooses tokens. Passes that only fill a cache do not count."
    flops, parameters = (
        " or ".join(sorted({f"{method[name]:.2f}" for method in results["arms"] if method[name]}))
        for name in ("reference_flops_weight", "reference_weight")
    )
    if flops:
        reason = results.get("reference_cost", f"the ratio of their FLOPs (ratio of parameters: {parameters})")
        text += f" A reference pass counts as {flops} target passes, {reason}. "
        text += "The paper's tokens per forward does not count reference passes."
    return text


def scope(results: Results) -> str:
    return (
        f"95 % intervals: paired bootstrap over {results['num_problems']} problems, omitted where fewer than 95 % of "
        "the resamples have a value. One training run per model: the intervals cover the choice of problems, not the "
        "variation between training runs."
    )


def headlines(results: Results) -> list[tuple[str, list[str]]]:
    """(what is compared, sentences) for every method with a baseline: speed at equal accuracy, accuracy at equal
    speed."""
    names = titles(results)
    pairs = [(names[c["arm"]], names[c["baseline"]], c["tokens_per_pass"]) for c in results["comparisons"]]
    return [
        (f"{method} compared with {baseline}", list(_headline(comparison, method, baseline)))
        for method, baseline, comparison in pairs
    ]


def _headline(comparison: dict[str, Any], method: str, baseline: str) -> Iterator[str]:
    for level in comparison["levels"]:
        yield _speed(level, f"At {percent(level['accuracy'])} accuracy", method, baseline)
    best = comparison["best"]
    yield _speed(best, f"At the best accuracy of {baseline}, {percent(best['accuracy'])}", method, baseline)
    if comparison["gains"]:
        slowest = comparison["gains"][0]  # where accuracies are highest
        own, base = percent(slowest["arm_accuracy"]), percent(slowest["baseline_accuracy"])
        difference = percentage_points(slowest["difference"])
        yield f"At {slowest['rate']:.2f} tokens per pass: {own} against {base}, {difference} percentage points."
    else:
        yield "Accuracies at equal speed cannot be compared: the curves share no range of speeds."


def _speed(level: dict[str, Any], where: str, method: str, baseline: str) -> str:
    if level["ratio"]["value"] is None:
        sides = [(method, level["arm"]), (baseline, level["baseline"])]
        reasons = [f"{name} is {side} it at every threshold" for name, side in sides if side != "crossed"]
        return f"{where}: no ratio, as {' and '.join(reasons)}."
    return f"{where}: {ratio(level['ratio'])} times the tokens per pass."


def hardware(results: Results) -> str:
    hardware = results["hardware"]
    parts = [", ".join(_device(device)) for device in hardware.get("devices", [])]
    return "; ".join([*parts, *(f"{n.replace('_', ' ')}: {_value(v)}" for n, v in hardware.items() if n != "devices")])


def _device(device: dict[str, Any]) -> Iterator[str]:
    for name, value in device.items():
        yield _value(value) if name in ("device", "dtype") else f"{name} {value}"


def reproduce(results: Results) -> str:
    default = (
        f"Recipe {results['recipe']}, seed {results['seed']}. recipe.yaml in the run directory holds every key. The "
        "same recipe gives the same answers for any batch size and any number of actors."
    )
    return str(results.get("reproduce", default))


def grader(results: Results) -> str:
    """Which grader judged the answers; nothing for results of releases that did not say it."""
    found = results.get("grader")
    if not found:
        return ""
    if found["differ"] is None:
        return f"Answers are judged by the only grader of the task {results['task']}."
    other = "official" if found["name"] == "default" else "default"
    differ = f"{found['differ']} of {found['answers']} answers"
    return f"Answers are judged by the {found['name']} grader; the {other} grader judges {differ} differently."


def settings_file_line(results: Results) -> str:
    """The settings file and what the recipe changed, or nothing."""
    file = results.get("settings_file")
    if file is None:
        return ""
    changed = f"changed: {', '.join(file['changed'])}" if file["changed"] else "unchanged"
    return f"settings file: {file['name']} (sha256 {file['sha256'][:16]}), {changed}"


# -- tables


def titles(results: Results) -> dict[str, str]:
    return {method["name"]: method["title"] for method in results["arms"]}


def curve_table(results: Results) -> Cells:
    """A row per threshold, a column per method."""
    rows = []
    for threshold in results["thresholds"]:
        row = [f"{threshold:g}"]
        for method in results["arms"]:
            p = next((p for p in method["curve"] if p["threshold"] == threshold), None)
            row.append(f"{100 * p['accuracy']:.1f} @ {p['tokens_per_pass']:.2f}" if p else "")
        rows.append(row)
    return ["threshold", *titles(results).values()], rows


def comparison_table(results: Results, measure: str) -> Cells:
    """Speed at equal accuracy, accuracy at equal speed."""
    names, comparisons = titles(results), results["comparisons"]
    unit = MEASURE_NAMES[measure]
    head = ["method", *(f"{unit} at {percent(x['accuracy'])}, ratio" for x in comparisons[0][measure]["levels"])]
    head += [f"{unit} at the baseline's best accuracy, ratio", f"accuracy at equal {unit}, percentage points"]
    rows = []
    for c in comparisons:
        comparison, best = c[measure], c[measure]["best"]
        gains = "\n".join(f"{percentage_points(g['difference'])} at {g['rate']:.2f}" for g in comparison["gains"])
        at_best = f"{_ratio_cell(best)}\nat {percent(best['accuracy'])}"
        rows.append([names[c["arm"]], *map(_ratio_cell, comparison["levels"]), at_best, gains or "no common range"])
    return head, rows


def _ratio_cell(level: dict[str, Any]) -> str:
    if level["ratio"]["value"] is None:
        sides = {"method": level["arm"], "baseline": level["baseline"]}
        return "not crossed: " + ", ".join(f"{name} {side}" for name, side in sides.items() if side != "crossed")
    return f"{ratio(level['ratio'])}\n{level['arm_rate']:.2f} against {level['baseline_rate']:.2f}"


def aup_table(results: Results) -> Cells:
    """Area under the accuracy-parallelism curve, and its difference to the baseline."""
    comparisons = {c["arm"]: c for c in results["comparisons"]}
    head, rows = ["method"], [[method["title"]] for method in results["arms"]]
    for measure, unit in MEASURE_NAMES.items():
        head += [f"AUP over {unit}", "difference to the baseline"]
        for row, method in zip(rows, results["arms"], strict=True):
            difference = comparisons[method["name"]][measure]["aup"] if method["name"] in comparisons else None
            row += [number(method["aup"][measure], ".0f"), number(difference, "+.0f") if difference else ""]
    return head, rows


def throughput_table(results: Results) -> Cells:
    """A row per point: accuracy with its interval, and all measures of speed."""
    rows = [
        [
            method["title"],
            f"{p['threshold']:g}",
            accuracy(p),
            "not measured" if p["tokens_per_second"] is None else f"{p['tokens_per_second']:.0f}",
            *(f"{p[name]:.2f}" for name in (*MEASURE_NAMES, "tokens_per_pass_by_parameters")),
        ]
        for method, p in _points(results)
    ]
    head = ["method", "threshold", "accuracy, %", "tokens/s", *MEASURE_NAMES.values(), "tokens per pass, by parameters"]
    return head, rows


def passes_table(results: Results) -> Cells:
    """Mean passes per answer, by kind."""
    names = ("tokens", *_PASSES)
    rows = [
        [method["title"], f"{p['threshold']:g}", *(f"{p[f'mean_{name}']:.2f}" for name in names)]
        for method, p in _points(results)
    ]
    return ["method", "threshold", *names], rows


def samples_table(results: Results) -> Cells:
    """Accuracy of the first, second, ... sample of every problem, one column each."""
    rows = [
        [method["title"], f"{p['threshold']:g}", *(f"{100 * a:.1f}" for a in p["accuracy_by_sample"])]
        for method, p in _points(results)
    ]
    return ["method", "threshold", *(f"sample {i}" for i in range(results["num_samples"]))], rows


def _points(results: Results) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    return ((method, point) for method in results["arms"] for point in method["curve"])


def statistics_table(results: Results) -> Cells:
    return ["", ""], [[n.replace("_", " "), str(v)] for n, v in results["statistics"].items() if n != "aup"]


# -- settings


def common_settings(results: Results) -> list[tuple[str, str]]:
    """(name, value) of the decoding settings that all methods share."""
    first, *others = (_settings(method) for method in results["arms"])
    shared = {k: v for k, v in first.items() if all(k in other and other[k] == v for other in others)}
    thresholds = ", ".join(f"{t:g}" for t in results["thresholds"])
    return [("confidence_threshold", f"swept: {thresholds}"), *((k, _value(v)) for k, v in shared.items())]


def differing_settings(results: Results) -> Cells:
    """A column per method: decoding settings that differ, and how the models were trained."""
    methods = results["arms"]
    shared = {name for name, _ in common_settings(results)}
    names = [name for name in dict.fromkeys(k for method in methods for k in _settings(method)) if name not in shared]
    rows = [[name, *(_value(method["decode"].get(name)) for method in methods)] for name in names]
    rows.append(["model", *(method["model"] for method in methods)])
    trained = [method["trained_with"] or {} for method in methods]
    for name in dict.fromkeys(k for settings in trained for k in settings):
        rows.append([f"trained with {name}", *(_value(s[name]) if name in s else "" for s in trained)])
    return ["", *titles(results).values()], rows


def _settings(method: dict[str, Any]) -> dict[str, Any]:
    """Without `trace`, which does not change what is decoded."""
    return {name: value for name, value in method["decode"].items() if name != "trace"}


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_value, value)) or "none"
    return str(value)


# -- numbers


def percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def accuracy(point: dict[str, Any]) -> str:
    """Accuracy in percent with its interval, and with the standard error for several samples."""
    low, high = (f"{100 * point[end]:.1f}" for end in ("accuracy_low", "accuracy_high"))
    text = f"{100 * point['accuracy']:.1f} ({low} to {high})"
    if point["num_samples"] > 1 and point["standard_error"] is not None:
        text += f", SE {100 * point['standard_error']:.1f}"
    return text


def ratio(estimate: dict[str, Any]) -> str:
    return number(estimate, ".2f")


def percentage_points(estimate: dict[str, Any]) -> str:
    return number(estimate, "+.1f", 100)


def number(estimate: dict[str, Any], form: str, scale: float = 1) -> str:
    """An estimate with its interval."""
    if estimate["value"] is None:
        return "none"
    text = f"{scale * estimate['value']:{form}}"
    if estimate["low"] is None:
        return f"{text} (no interval)"
    return f"{text} ({scale * estimate['low']:{form}} to {scale * estimate['high']:{form}})"
