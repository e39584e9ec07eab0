"""Runs side by side: what `rcd report` reads, which runs are one recipe under several seeds, and their numbers.

A run here is anything with a results.json: a run's directory, or what `rcd evaluate --output` wrote. Runs are only put
next to each other: intervals and ratios are each run's own, against its own baseline; between runs nothing is paired.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from pipelines.evaluation.results import SCHEMA_VERSION
from pipelines.recipe.files import parse_yaml
from pipelines.report.text import Cells, Results, number, percent, ratio
from pipelines.run.keys import flatten
from rcd_core.errors import UserError
from rcd_core.io import storage

MEASURE = "tokens_per_pass"
# What may differ between runs that are one but for the seed, and says nothing about what they found.
_NAMES = ("name", "storage", "seed")
_SECTIONS = ("resources.", "deploy.")
_ABSENT = "not there"


@dataclass(frozen=True)
class Run:
    """label: what tells it from the others. made_with: flat recipe, or where there is none the decoding settings."""

    label: str
    results: Results
    made_with: dict[str, Any]

    def arm(self, name: str) -> dict[str, Any] | None:
        return next((arm for arm in self.results["arms"] if arm["name"] == name), None)

    def speeds(self, arm: str) -> dict[str, dict[str, Any]]:
        """Ratio of the arm to its baseline, by where it was taken; nothing for the baseline itself."""
        found = next((c[MEASURE] for c in self.results["comparisons"] if c["arm"] == arm and c.get(MEASURE)), None)
        if found is None:
            return {}
        levels = {f"ratio at {percent(level['accuracy'])}": level["ratio"] for level in found["levels"]}
        return {**levels, "ratio at the baseline's best": found["best"]["ratio"]}


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed; most often one."""

    label: str
    runs: tuple[Run, ...]


def load_runs(paths: Sequence[str]) -> list[Run]:
    """Directories and URIs -> runs. UserError for a path without results, with results of an older form, or twice."""
    places = [path.rstrip("/") if storage.is_uri(path) else os.path.abspath(os.path.expanduser(path)) for path in paths]
    labels = _told_apart(places)
    return [_load(place, label) for place, label in zip(places, labels, strict=True)]


def _load(directory: str, label: str) -> Run:
    files = [storage.join(directory, *parts) for parts in (("evaluate", "results.json"), ("results.json",))]
    file = next((file for file in files if storage.exists(file)), None)
    if file is None:
        raise UserError(
            f"{directory}: there is no evaluation, neither {files[0]} nor results.json; run the stage evaluate"
        )
    results = storage.read_json(file)
    if not isinstance(results, dict) or results.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{file} was made by another version of this program; evaluate again (--redo evaluate)")
    if results.get("passes") == "not reported":
        raise UserError(f"{file} is of an endpoint that tells no passes, so it has no curve; see its own report.html")
    recipe = storage.join(directory, "recipe.yaml")
    if storage.exists(recipe):
        raw = parse_yaml(storage.read_bytes(recipe).decode(), recipe)
    else:
        arms = {arm["name"]: {k: v for k, v in arm["decode"].items() if k != "seed"} for arm in results["arms"]}
        raw = {"recipe": results["recipe"], "task": results["task"], "decode": arms}
    flat = flatten(raw)
    made_with = {k: v for k, v in flat.items() if k not in _NAMES and not k.startswith(_SECTIONS)}
    return Run(label, results, made_with)


def _told_apart(places: Sequence[str]) -> list[str]:
    """The last parts of paths, as many as it takes."""
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{place} is named twice; name each run once")
    for depth in range(1, 1 + max(place.count("/") for place in places)):
        labels = ["/".join(place.split("/")[-depth:]) for place in places]
        if len(set(labels)) == len(labels):
            return labels
    return list(places)


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Runs of one recipe together, in the order in which they come, their seeds ascending."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(run.made_with, sort_keys=True), []).append(run)
    groups = [sorted(members, key=lambda run: run.results["seed"]) for members in found.values()]
    stems = [_stem([run.label for run in members]) for members in groups]
    names = [
        stem if stems.count(stem) == 1 else ", ".join(run.label for run in members)
        for stem, members in zip(stems, groups, strict=True)
    ]
    return [Group(name, tuple(members)) for name, members in zip(names, groups, strict=True)]


def _stem(labels: Sequence[str]) -> str:
    """demo-s0, demo-s1 -> demo"""
    if len(labels) == 1:
        return labels[0]
    return re.sub(r"[-_.]*(s|seed)?[-_.]*\d*$", "", os.path.commonprefix(list(labels))) or labels[0]


def differences(groups: Sequence[Group]) -> Cells:
    """A row per key of the recipes that differs, a column per group."""
    made = [group.runs[0].made_with for group in groups]
    keys = sorted({key for one in made for key in one})
    rows = [[key, *(_show(one, key) for one in made)] for key in keys]
    return ["key", *(group.label for group in groups)], [row for row in rows if len(set(row[1:])) > 1]


def _show(made_with: dict[str, Any], key: str) -> str:
    return json.dumps(made_with[key]) if key in made_with else _ABSENT


def arms_of(groups: Sequence[Group]) -> dict[str, str]:
    """Arm name -> title, over all runs."""
    return {arm["name"]: arm["title"] for group in groups for run in group.runs for arm in run.results["arms"]}


def arm_table(groups: Sequence[Group], name: str) -> Cells:
    """One arm in all runs: ratios, AUP, accuracy @ tokens per pass by threshold; of several seeds each, mean and SD."""
    held = [(group, [run for run in group.runs if run.arm(name)]) for group in groups]
    runs = [run for _, members in held for run in members]
    thresholds = sorted({point["threshold"] for run in runs for point in _arm(run, name)["curve"]})
    ratios = list(dict.fromkeys(key for run in runs for key in run.speeds(name)))
    rows = []
    for group, members in held:
        for run in members:
            rows.append([group.label, str(run.results["seed"]), *_cells(run, name, thresholds, ratios)])
        if len(members) > 1:
            rows.append([group.label, "mean ± SD", *_mean_cells(members, name, thresholds, ratios)])
    return ["run", "seed", *ratios, "AUP", *(f"{threshold:g}" for threshold in thresholds)], rows


def _arm(run: Run, name: str) -> dict[str, Any]:
    arm = run.arm(name)
    assert arm is not None
    return arm


def _points_at(runs: Sequence[Run], name: str, threshold: float) -> list[dict[str, Any]]:
    """The arm's point in each run that has it."""
    arms = [arm for run in runs if (arm := run.arm(name))]
    return [point for arm in arms for point in arm["curve"] if point["threshold"] == threshold]


@dataclass(frozen=True)
class Spot:
    """A point of a mean curve: tokens per pass, accuracy in %, and how far its bar reaches below and above."""

    rate: float
    accuracy: float
    below: float
    above: float


def mean_curve(runs: Sequence[Run], name: str) -> list[Spot]:
    """An arm along the thresholds: means and SD over seeds, or one run with its interval. Rates that nobody reported
    give no point."""
    points = [point for run in runs if (arm := run.arm(name)) for point in arm["curve"]]
    spots = []
    for threshold in sorted({point["threshold"] for point in points}):
        known = [p for p in points if p["threshold"] == threshold and p.get(MEASURE) is not None]
        if not known:
            continue
        rate, (accuracy, sd) = fmean(p[MEASURE] for p in known), mean_sd([100 * p["accuracy"] for p in known])
        below, above = (abs(accuracy - 100 * known[0][end]) for end in ("accuracy_low", "accuracy_high"))
        spots.append(Spot(rate, accuracy, below, above) if len(known) == 1 else Spot(rate, accuracy, sd, sd))
    return spots


def _cells(run: Run, name: str, thresholds: Sequence[float], ratios: Sequence[str]) -> list[str]:
    speeds, aup = run.speeds(name), (_arm(run, name).get("aup") or {}).get(MEASURE)
    cells = [_or(speeds[key], "not crossed", ratio) if key in speeds else "" for key in ratios]
    cells.append(number(aup, ".1f") if aup else "")
    return cells + [" ".join(map(_point, _points_at([run], name, threshold))) for threshold in thresholds]


def _or(estimate: dict[str, Any], otherwise: str, form: Any) -> str:
    return otherwise if estimate["value"] is None else str(form(estimate))


def _point(point: dict[str, Any]) -> str:
    rate = point.get(MEASURE)
    return f"{100 * point['accuracy']:.1f} @ " + ("not reported" if rate is None else f"{rate:.2f}")


def _mean_cells(runs: Sequence[Run], name: str, thresholds: Sequence[float], ratios: Sequence[str]) -> list[str]:
    cells = []
    for key in ratios:
        found = [run.speeds(name)[key]["value"] for run in runs if key in run.speeds(name)]
        cells.append(_counted([value for value in found if value is not None], len(found), ".2f"))
    areas = [aup[MEASURE]["value"] for run in runs if (aup := _arm(run, name).get("aup"))]
    cells.append(_counted([area for area in areas if area is not None], len(areas), ".1f"))
    for threshold in thresholds:
        points = _points_at(runs, name, threshold)
        accuracy = mean_sd([100 * point["accuracy"] for point in points])
        rate = mean_sd([point[MEASURE] for point in points if point.get(MEASURE) is not None])
        cells.append(f"{_spread(accuracy, '.1f')}\n@ {_spread(rate, '.2f')}")
    return cells


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1), NaN where there are too few."""
    return fmean(values) if values else math.nan, stdev(values) if len(values) > 1 else math.nan


def _spread(found: tuple[float, float], form: str) -> str:
    return f"{found[0]:{form}} ± {found[1]:{form}}" if not math.isnan(found[1]) else f"{found[0]:{form}}"


def _counted(values: Sequence[float], of: int, form: str) -> str:
    """Mean ± SD, and of how many where not all have one."""
    if not values:
        return "not crossed" if of else ""
    return _spread(mean_sd(values), form) + (f" (of {len(values)} of {of} seeds)" if len(values) < of else "")
