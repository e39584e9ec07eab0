"""Loads the results of several runs for `rcd report`, groups the seeds of one recipe, and tabulates their numbers.

A run is anything with a results.json: a run directory, or the output of `rcd evaluate`. Intervals and ratios are those
of each run against its own baseline; runs are not paired with each other.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from pipelines.evaluation.results import SCHEMA_VERSION
from pipelines.recipe.files import parse_yaml
from pipelines.report import text
from pipelines.report.text import Cells, Results, number, percent, ratio
from pipelines.run.keys import flatten
from rcd_core.errors import UserError
from rcd_core.io import storage

MEASURE = "tokens_per_pass"
# Recipe keys that may differ between the seeds of one group.
_NAMES = ("name", "storage", "seed")
_SECTIONS = ("resources.", "deploy.")


@dataclass(frozen=True)
class Run:
    """label: distinguishes it from the other runs. config: the flat recipe, or the decoding settings without one."""

    label: str
    results: Results
    config: dict[str, Any]

    def method(self, name: str) -> dict[str, Any] | None:
        """The entry of results.json."""
        return next((method for method in self.results["arms"] if method["name"] == name), None)

    def ratios(self, method: str) -> dict[str, dict[str, Any]]:
        """Speed of the method over its baseline's, by where it was compared; empty for the baseline itself."""
        comparison = next((c.get(MEASURE) for c in self.results["comparisons"] if c["arm"] == method), None)
        if not comparison:
            return {}
        levels = {f"ratio at {percent(level['accuracy'])}": level["ratio"] for level in comparison["levels"]}
        return {**levels, "ratio at the baseline's best": comparison["best"]["ratio"]}

    def aup(self, method: str) -> dict[str, Any] | None:
        return ((self.method(method) or {}).get("aup") or {}).get(MEASURE)

    def points(self, method: str, threshold: float | None = None) -> list[dict[str, Any]]:
        """The curve of the method, or its point at one threshold."""
        curve = (self.method(method) or {"curve": []})["curve"]
        return [point for point in curve if threshold is None or point["threshold"] == threshold]


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed only; usually one."""

    label: str
    runs: tuple[Run, ...]


def load_runs(paths: Sequence[str]) -> list[Run]:
    """Directories and URIs -> runs. Raises UserError for a path without results, with results of another schema, or
    given twice."""
    directories = [p.rstrip("/") if storage.is_uri(p) else os.path.abspath(os.path.expanduser(p)) for p in paths]
    return [_load(*pair) for pair in zip(directories, _unique_labels(directories), strict=True)]


def _load(directory: str, label: str) -> Run:
    files = [storage.join(directory, *parts) for parts in (("evaluate", "results.json"), ("results.json",))]
    file = next((file for file in files if storage.exists(file)), None)
    if file is None:
        raise UserError(f"{directory} has no evaluation: neither {files[0]} nor results.json; run the stage evaluate")
    results = storage.read_json(file)
    if not isinstance(results, dict) or results.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{file} is not of schema_version {SCHEMA_VERSION}: another version of this program wrote it; evaluate "
            "again (--redo evaluate)"
        )
    if results.get("passes") == "not reported":
        raise UserError(f"{file} is of an endpoint that does not report passes, so it has no curve; see report.html")
    recipe = storage.join(directory, "recipe.yaml")
    if storage.exists(recipe):
        raw = parse_yaml(storage.read_bytes(recipe).decode(), recipe)
    else:
        decode = {
            method["name"]: {k: v for k, v in method["decode"].items() if k != "seed"} for method in results["arms"]
        }
        raw = {"recipe": results["recipe"], "task": results["task"], "decode": decode}
    flat = flatten(raw) | {"evaluate.grader": (results.get("grader") or {"name": "default"})["name"]}
    config = {k: v for k, v in flat.items() if k not in _NAMES and not k.startswith(_SECTIONS)}
    return Run(label, results, config)


def _unique_labels(directories: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as are needed to distinguish them."""
    for directory in directories:
        if directories.count(directory) > 1:
            raise UserError(f"{directory} is given twice; name each run once")
    for depth in range(1, 1 + max(directory.count("/") for directory in directories)):
        labels = ["/".join(directory.split("/")[-depth:]) for directory in directories]
        if len(set(labels)) == len(labels):
            return labels
    return list(directories)


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Groups in the order of their first runs, seeds ascending."""
    by_config: dict[str, list[Run]] = {}
    for run in runs:
        by_config.setdefault(json.dumps(run.config, sort_keys=True), []).append(run)
    groups = [sorted(members, key=lambda run: run.results["seed"]) for members in by_config.values()]
    stems = [_stem([run.label for run in members]) for members in groups]
    return [
        Group(stem if stems.count(stem) == 1 else ", ".join(run.label for run in members), tuple(members))
        for stem, members in zip(stems, groups, strict=True)
    ]


def _stem(labels: Sequence[str]) -> str:
    """demo-s0, demo-s1 -> demo"""
    if len(labels) == 1:
        return labels[0]
    return re.sub(r"[-_.]*(s|seed)?[-_.]*\d*$", "", os.path.commonprefix(list(labels))) or labels[0]


def differences(groups: Sequence[Group]) -> Cells:
    """A row per recipe key that differs, a column per group."""
    configs = [group.runs[0].config for group in groups]
    keys = sorted({key for config in configs for key in config})
    rows = [[key, *(json.dumps(c[key]) if key in c else "absent" for c in configs)] for key in keys]
    return ["key", *(group.label for group in groups)], [row for row in rows if len(set(row[1:])) > 1]


def graders(groups: Sequence[Group]) -> list[str]:
    """A sentence per run that says which grader judged its answers."""
    runs = [run for group in groups for run in group.runs]
    return [f"{run.label}: {line}" for run in runs if (line := text.grader(run.results))]


def methods_of(groups: Sequence[Group]) -> dict[str, str]:
    """Name -> title of the methods of all runs."""
    return {method["name"]: method["title"] for group in groups for run in group.runs for method in run.results["arms"]}


def method_table(groups: Sequence[Group], name: str) -> Cells:
    """One method in all runs: ratios, AUP, accuracy @ tokens per pass by threshold. Groups of several seeds also have a
    row of means and standard deviations."""
    members = [(group.label, [run for run in group.runs if run.method(name)]) for group in groups]
    all_runs = [run for _, runs in members for run in runs]
    thresholds = sorted({point["threshold"] for run in all_runs for point in run.points(name)})
    ratios = list(dict.fromkeys(key for run in all_runs for key in run.ratios(name)))
    rows = []
    for label, runs in members:
        for run in runs:
            rows.append([label, str(run.results["seed"]), *_cells(run, name, thresholds, ratios)])
        if len(runs) > 1:
            rows.append([label, "mean ± SD", *_mean_cells(runs, name, thresholds, ratios)])
    return ["run", "seed", *ratios, "AUP", *(f"{threshold:g}" for threshold in thresholds)], rows


def _cells(run: Run, name: str, thresholds: Sequence[float], keys: Sequence[str]) -> list[str]:
    ratios, aup = run.ratios(name), run.aup(name)
    cells = [_or_not_crossed(ratios[key], ratio) if key in ratios else "" for key in keys]
    cells.append(number(aup, ".1f") if aup else "")
    return cells + [" ".join(map(_point_cell, run.points(name, threshold))) for threshold in thresholds]


def _or_not_crossed(estimate: dict[str, Any], form: Callable[[dict[str, Any]], str]) -> str:
    return "not crossed" if estimate["value"] is None else form(estimate)


def _point_cell(point: dict[str, Any]) -> str:
    rate = point.get(MEASURE)
    return f"{100 * point['accuracy']:.1f} @ " + ("not reported" if rate is None else f"{rate:.2f}")


def _mean_cells(runs: Sequence[Run], name: str, thresholds: Sequence[float], keys: Sequence[str]) -> list[str]:
    cells = [_mean_cell([run.ratios(name)[key] for run in runs if key in run.ratios(name)], ".2f") for key in keys]
    cells.append(_mean_cell([aup for run in runs if (aup := run.aup(name))], ".1f"))
    for threshold in thresholds:
        points = [point for run in runs for point in run.points(name, threshold)]
        accuracy = mean_sd([100 * point["accuracy"] for point in points])
        rate = mean_sd([point[MEASURE] for point in points if point.get(MEASURE) is not None])
        cells.append(f"{_plus_minus(accuracy, '.1f')}\n@ {_plus_minus(rate, '.2f')}")
    return cells


def _mean_cell(estimates: Sequence[dict[str, Any]], form: str) -> str:
    """Mean ± SD of the estimates with a value, and how many those are if not all."""
    values = [estimate["value"] for estimate in estimates if estimate["value"] is not None]
    if not values:
        return "not crossed" if estimates else ""
    cell = _plus_minus(mean_sd(values), form)
    return cell if len(values) == len(estimates) else f"{cell} ({len(values)} of {len(estimates)} seeds)"


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1), NaN for too few values."""
    return fmean(values) if values else math.nan, stdev(values) if len(values) > 1 else math.nan


def _plus_minus(mean_and_sd: tuple[float, float], form: str) -> str:
    mean, sd = mean_and_sd
    return f"{mean:{form}}" if math.isnan(sd) else f"{mean:{form}} ± {sd:{form}}"


@dataclass(frozen=True)
class CurvePoint:
    """rate: tokens per pass. accuracy: in %. bar: lengths of the error bar below and above it, which ends at 0 and
    100 %."""

    rate: float
    accuracy: float
    bar: tuple[float, float]


def mean_curve(runs: Sequence[Run], name: str) -> list[CurvePoint]:
    """A method along the thresholds: mean and SD over seeds, or one run with its 95 % interval. Points without a
    reported rate are left out."""
    points = [point for run in runs for point in run.points(name) if point.get(MEASURE) is not None]
    curve = []
    for threshold in sorted({point["threshold"] for point in points}):
        here = [point for point in points if point["threshold"] == threshold]
        rate, (accuracy, sd) = fmean(p[MEASURE] for p in here), mean_sd([100 * p["accuracy"] for p in here])
        low, high = (abs(accuracy - 100 * here[0][end]) for end in ("accuracy_low", "accuracy_high"))
        spread = min(sd, accuracy), min(sd, 100 - accuracy)
        curve.append(CurvePoint(rate, accuracy, (low, high) if len(here) == 1 else spread))
    return curve
