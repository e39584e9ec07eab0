"""The words and table cells in which an evaluation is told, on the terminal and on the page.

Everything here reads results.json. It says what was measured and how sure that is, in the same words whichever arm is
ahead. A table is a head and rows of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Results = dict[str, Any]
Cells = tuple[list[str], list[list[str]]]
MEASURE_NAMES = {"tokens_per_pass": "tokens per pass", "tokens_per_forward": "tokens per forward"}
_KINDS = ("denoise", "reference", "prefill", "store")


# -- sentences


def title(results: Results) -> str:
    samples = f", {results['num_samples']} samples of each" if results["num_samples"] > 1 else ""
    return f"{results['recipe']}: {results['task']}, {results['num_problems']} held-out problems{samples}"


def measured(results: Results) -> str:
    seeds = ", each sample with a seed of its own" if results["num_samples"] > 1 else ""
    return (
        f"{results['num_problems']} held-out problems of the task {results['task']}, each decoded by every arm at "
        f"every threshold{seeds}. Accuracies have 95 % intervals ({results['statistics']['accuracy_interval']})."
    )


def costs(results: Results) -> str:
    """What a pass is."""
    text = "Tokens per pass: generated tokens over the passes that choose tokens; passes that only fill a cache are not"
    text += " counted."
    flops, parameters = (
        " or ".join(sorted({f"{arm[name]:.2f}" for arm in results["arms"] if arm[name]}))
        for name in ("reference_flops_weight", "reference_weight")
    )
    if flops:
        why = results.get("reference_cost", f"the ratio of their FLOPs (ratio of parameters: {parameters})")
        text += f" A reference pass counts as {flops} of a target pass, {why}; "
        text += "the paper's tokens per forward leaves it out."
    return text


def scope(results: Results) -> str:
    return (
        f"95 % intervals, paired bootstrap over {results['num_problems']} problems; none is given where fewer than "
        "95 % of the resamples have a value. One training run per model: the intervals cover the choice of problems, "
        "not the spread between training runs."
    )


def headlines(results: Results) -> list[tuple[str, list[str]]]:
    """For each arm against its baseline what is compared, and a sentence on each way to compare: speed at equal
    accuracy, accuracy at equal speed."""
    names = titles(results)
    pairs = [(names[c["arm"]], names[c["baseline"]], c["tokens_per_pass"]) for c in results["comparisons"]]
    return [(f"{arm} against {baseline}", list(_headline(found, arm, baseline))) for arm, baseline, found in pairs]


def _headline(found: dict[str, Any], arm: str, baseline: str) -> Iterator[str]:
    for level in found["levels"]:
        yield _speed(level, f"At {percent(level['accuracy'])} accuracy", arm, baseline)
    best = found["best"]
    yield _speed(best, f"At the best accuracy of {baseline}, {percent(best['accuracy'])}", arm, baseline)
    if found["gains"]:
        slow = found["gains"][0]  # of the speeds that are compared the one with the highest accuracies
        own, base = percent(slow["arm_accuracy"]), percent(slow["baseline_accuracy"])
        yield f"At {slow['rate']:.2f} tokens per pass: {own} against {base}, {points(slow['difference'])} points."
    else:
        yield "No speed that both reach, so no difference in accuracy at equal speed."


def _speed(level: dict[str, Any], where: str, arm: str, baseline: str) -> str:
    if level["ratio"]["value"] is None:
        return f"{where}: no ratio, as {_why_not(level, arm, baseline)}."
    return f"{where}: {ratio(level['ratio'])} times the tokens per pass."


def _why_not(level: dict[str, Any], arm: str, baseline: str) -> str:
    sides = [(arm, level["arm"]), (baseline, level["baseline"])]
    return " and ".join(f"{name} is {side} it at every threshold" for name, side in sides if side != "crossed")


def hardware(results: Results) -> str:
    found = results["hardware"]
    parts = [", ".join(_device(device)) for device in found.get("devices", [])]
    rest = {k: v for k, v in found.items() if k != "devices"}
    return "; ".join([*parts, *(f"{name.replace('_', ' ')}: {_value(value)}" for name, value in rest.items())])


def _device(device: dict[str, Any]) -> Iterator[str]:
    for name, value in device.items():
        yield _value(value) if name in ("device", "dtype") else f"{name} {value}"


def reproduce(results: Results) -> str:
    default = (
        f"Recipe {results['recipe']}, seed {results['seed']}. recipe.yaml in the run's directory holds every key as it "
        "was used; the same recipe gives the same answers, whatever the batch size and the number of actors."
    )
    return str(results.get("reproduce", default))


# -- tables


def titles(results: Results) -> dict[str, str]:
    return {arm["name"]: arm["title"] for arm in results["arms"]}


def curve_table(results: Results) -> Cells:
    """A row per threshold, a column per arm."""
    rows = []
    for threshold in results["thresholds"]:
        row = [f"{threshold:g}"]
        for arm in results["arms"]:
            p = next((p for p in arm["curve"] if p["threshold"] == threshold), None)
            row.append(f"{100 * p['accuracy']:.1f} @ {p['tokens_per_pass']:.2f}" if p else "")
        rows.append(row)
    return ["threshold", *(arm["title"] for arm in results["arms"])], rows


def comparison_table(results: Results, measure: str) -> Cells:
    """Speed at equal accuracy, accuracy at equal speed."""
    names, comparisons = titles(results), results["comparisons"]
    unit = MEASURE_NAMES[measure]
    head = ["arm", *(f"{unit} at {percent(x['accuracy'])}, ratio" for x in comparisons[0][measure]["levels"])]
    head += [f"{unit} at the baseline's best accuracy, ratio", f"difference in accuracy (points) at equal {unit}"]
    rows = []
    for c in comparisons:
        found, best = c[measure], c[measure]["best"]
        gains = "\n".join(f"{points(g['difference'])} at {g['rate']:.2f}" for g in found["gains"])
        at_best = f"{_ratio_cell(best)}\nat {percent(best['accuracy'])}"
        rows.append([names[c["arm"]], *map(_ratio_cell, found["levels"]), at_best, gains or "no common range"])
    return head, rows


def _ratio_cell(level: dict[str, Any]) -> str:
    if level["ratio"]["value"] is None:
        sides = {"arm": level["arm"], "baseline": level["baseline"]}
        return "not crossed: " + ", ".join(f"{who} {side}" for who, side in sides.items() if side != "crossed")
    return f"{ratio(level['ratio'])}\n{level['arm_rate']:.2f} against {level['baseline_rate']:.2f}"


def aup_table(results: Results) -> Cells:
    """Area under the accuracy-parallelism curve, and its difference to the baseline."""
    found = {c["arm"]: c for c in results["comparisons"]}
    head, rows = ["arm"], [[arm["title"]] for arm in results["arms"]]
    for measure, unit in MEASURE_NAMES.items():
        head += [f"AUP over {unit}", "against the baseline"]
        for row, arm in zip(rows, results["arms"], strict=True):
            difference = found[arm["name"]][measure]["aup"] if arm["name"] in found else None
            row += [number(arm["aup"][measure], ".0f"), number(difference, "+.0f") if difference else ""]
    return head, rows


def throughput_table(results: Results) -> Cells:
    """Every point: accuracy with its interval, and all measures of speed."""
    head = ["arm", "threshold", "accuracy, %", "tokens/s", "tokens per pass", "tokens per forward"]
    head += ["tokens per pass, by parameters"]
    rows = [
        [
            arm["title"],
            f"{p['threshold']:g}",
            _accuracy(p),
            "not taken" if p["tokens_per_second"] is None else f"{p['tokens_per_second']:.0f}",
            *(f"{p[name]:.2f}" for name in (*MEASURE_NAMES, "tokens_per_pass_by_parameters")),
        ]
        for arm in results["arms"]
        for p in arm["curve"]
    ]
    return head, rows


def _accuracy(p: dict[str, Any]) -> str:
    text = f"{100 * p['accuracy']:.1f} ({100 * p['accuracy_low']:.1f} to {100 * p['accuracy_high']:.1f})"
    if p["num_samples"] > 1 and p["standard_error"] is not None:
        text += f", SE {100 * p['standard_error']:.1f}"
    return text


def passes_table(results: Results) -> Cells:
    """Mean passes of an answer, by kind."""
    rows = [
        [arm["title"], f"{p['threshold']:g}", *(f"{p[f'mean_{kind}']:.2f}" for kind in ("tokens", *_KINDS))]
        for arm in results["arms"]
        for p in arm["curve"]
    ]
    return ["arm", "threshold", "tokens", *_KINDS], rows


def samples_table(results: Results) -> Cells:
    """Accuracy of the first, second, ... sample of every problem, one column each."""
    rows = [
        [arm["title"], f"{p['threshold']:g}", *(f"{100 * a:.1f}" for a in p["accuracy_by_sample"])]
        for arm in results["arms"]
        for p in arm["curve"]
    ]
    return ["arm", "threshold", *(f"sample {i}" for i in range(results["num_samples"]))], rows


# -- settings


def common_settings(results: Results) -> list[tuple[str, str]]:
    """Decoding settings that all arms share, in words."""
    first, *others = (_told(arm) for arm in results["arms"])
    shared = {k: v for k, v in first.items() if all(k in other and other[k] == v for other in others)}
    thresholds = ", ".join(f"{t:g}" for t in results["thresholds"])
    return [("confidence_threshold", f"swept: {thresholds}"), *((k, _value(v)) for k, v in shared.items())]


def differing_settings(results: Results) -> Cells:
    """A column per arm: settings in which arms differ, and how their models were trained."""
    arms = results["arms"]
    shared = {name for name, _ in common_settings(results)}
    names = [name for name in dict.fromkeys(k for arm in arms for k in _told(arm)) if name not in shared]
    rows = [[name, *(_value(arm["decode"].get(name)) for arm in arms)] for name in names]
    rows.append(["model", *(arm["model"] for arm in arms)])
    trained = [arm["trained_with"] or {} for arm in arms]
    for name in dict.fromkeys(k for one in trained for k in one):
        rows.append([f"trained with {name}", *(_value(one[name]) if name in one else "" for one in trained)])
    return ["", *(arm["title"] for arm in arms)], rows


def _told(arm: dict[str, Any]) -> dict[str, Any]:
    """trace changes what is said of a decoding, not the decoding."""
    return {name: value for name, value in arm["decode"].items() if name != "trace"}


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return (
        ", ".join(map(_value, value)) or "none"
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )


# -- numbers


def percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def ratio(estimate: dict[str, Any]) -> str:
    return number(estimate, ".2f")


def points(estimate: dict[str, Any]) -> str:
    return number(estimate, "+.1f", 100)


def number(estimate: dict[str, Any], form: str, scale: float = 1) -> str:
    """An estimate with its interval."""
    if estimate["value"] is None:
        return "none"
    text = f"{scale * estimate['value']:{form}}"
    if estimate["low"] is None:
        return f"{text} (no interval)"
    return f"{text} ({scale * estimate['low']:{form}} to {scale * estimate['high']:{form}})"
