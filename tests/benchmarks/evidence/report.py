"""Reports the cells: each method against SeqD of the same replicate, then means over replicates. Tables, plots, JSON.

Tokens per pass count a reference pass by its FLOPs (evaluation.flops), as the pipeline's evaluation does. The cost of
training is separate: `training`, in units of SeqD's second stage.

Shapes: T thresholds, N problems, R resamples.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rcd_core.evaluation.flops import pass_flops
from rcd_core.evaluation.outcomes import Outcomes
from rcd_core.evaluation.statistics import Curves, compare, crossing, estimate, resample
from rcd_core.families.config import ModelConfig
from rcd_core.training.plan import ModelShape
from tests.benchmarks.evidence.plan import Arm, Experiment, Plan
from tests.benchmarks.evidence.run import NO_REFERENCE, Cell, cells

BASELINE = "seqd"
LEVEL = 0.9
RESULTS = "results.json"
NAMES = ("arm", "title", "reference", "start")
LEVELS = (0.6, 0.7, 0.8, LEVEL, 0.95)


@dataclass(frozen=True)
class Loaded:
    """One method of one replicate, decoded from one start."""

    arm: Arm
    reference: str
    start: str
    replicate: tuple[int, int]
    outcomes: Outcomes
    curves: Curves
    facts: dict[str, float]

    @property
    def title(self) -> str:
        reference = "" if self.reference == NO_REFERENCE else f", {self.reference} reference"
        start = ", reference start" if self.start == "reference" else ""
        return f"{self.arm.title}{reference}{start}"


def report(plan: Plan, names: list[str], output: Path, write: Path | None) -> None:
    """Print a table per experiment. With `write`, the replicates that results.json there already has are counted too,
    and results.json and a plot per experiment are written there."""
    results = kept(write)
    for name in names:
        loaded, complete = load(plan, plan.experiments[name], output)
        if runs := _runs(loaded) + _kept_runs(results.get(name), complete):
            results[name] = _experiment(plan.experiments[name], runs)
            print(_table(name, results[name]))
    if write:
        write.mkdir(parents=True, exist_ok=True)
        (write / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
        for name, result in results.items():
            (write / f"{name}.png").write_bytes(_plot(name, result))


def kept(directory: Path | None) -> dict[str, Any]:
    """Experiment -> its part of results.json, if there is one."""
    if directory is None or not (directory / RESULTS).exists():
        return {}
    return dict(json.loads((directory / RESULTS).read_text()))


def replicates(result: dict[str, Any]) -> set[tuple[int, int]]:
    return {(base, seed) for base, seed in result.get("replicates", [])}


def load(plan: Plan, experiment: Experiment, output: Path) -> tuple[list[Loaded], list[tuple[int, int]]]:
    """Decoded results of an experiment's complete replicates, that is, those with every method."""
    found: dict[tuple[int, int], list[Cell]] = defaultdict(list)
    for cell in cells(plan, [experiment.name], len(experiment.replicates)):
        found[cell.base, cell.seed].append(cell)
    complete = [pair for pair, mine in found.items() if all((output / f"{c.name}.npz").exists() for c in mine)]
    loaded = [part for pair in complete for cell in found[pair] for part in _load(cell, output / f"{cell.name}.npz")]
    return loaded, complete


def load_cells(plan: Plan, experiment: Experiment, output: Path) -> list[Loaded]:
    """All decoded results of an experiment, those of unfinished replicates too."""
    todo = [(cell, output / f"{cell.name}.npz") for cell in cells(plan, [experiment.name], len(experiment.replicates))]
    return [part for cell, path in todo if path.exists() for part in _load(cell, path)]


def _load(cell: Cell, path: Path) -> Iterator[Loaded]:
    with np.load(path) as data:
        facts = {n.removeprefix("fact."): data[n] for n in data.files if n.startswith("fact.")}
        scalars = {n: float(v) for n, v in facts.items() if v.ndim == 0}
        for start in sorted({n.split(".")[0] for n in data.files if not n.startswith("fact.")}):
            part = {n: data[f"{start}.{n}"].astype(float) for n in ("correct", "tokens", "denoise", "reference")}
            passes = part["denoise"].sum() / max(1.0, part["reference"].sum())
            weight = _reference_weight(cell, passes) if part["reference"].any() else 0.0
            nothing = np.zeros_like(part["tokens"])
            outcomes = Outcomes(
                thresholds=cell.experiment.thresholds,
                example_ids=tuple(str(i) for i in range(part["tokens"].shape[1])),
                correct=part["correct"][:, :, None],
                tokens=part["tokens"],
                denoise=part["denoise"],
                reference=part["reference"],
                prefill=nothing,
                store=nothing,
                reference_cost=weight * part["reference"],
                reference_cost_by_parameters=nothing,
                seconds=nothing,
            )
            replicate = (cell.base, cell.seed)
            yield Loaded(cell.arm, cell.reference, start, replicate, outcomes, resample(outcomes), scalars)


def _reference_weight(cell: Cell, passes: float) -> float:
    """FLOPs of a reference pass in passes of the target, which predict n (p + 1) / (2 p) positions of a block on
    average; the context in front of the block is counted as half of max_length for texts."""
    e = cell.experiment
    block = e.block_length
    keys = block if e.max_length == block else e.max_length / 2
    reference, _ = e.references[cell.reference]
    own = pass_flops(_shape(e.target, e), queries=block, keys=keys, predicted=block * (passes + 1) / (2 * passes))
    return pass_flops(_shape(reference, e), queries=block, keys=keys, predicted=block) / own


def _shape(config: ModelConfig, experiment: Experiment) -> ModelShape:
    return ModelShape.of(config, experiment.vocab_size)


# -- one experiment


def _runs(loaded: list[Loaded]) -> list[dict[str, Any]]:
    """Each method of each replicate, against SeqD of the same replicate."""
    baselines = {part.replicate: part for part in loaded if part.arm.name == BASELINE}
    return [{**dict(zip(NAMES, _names(part), strict=True)), **_run(part, baselines[part.replicate])} for part in loaded]


def _names(part: Loaded) -> tuple[str, ...]:
    return part.arm.name, part.title, part.reference, part.start


def _kept_runs(result: dict[str, Any] | None, newer: list[tuple[int, int]]) -> list[dict[str, Any]]:
    if result is None:
        return []
    runs = [{**{name: arm[name] for name in NAMES}, **run} for arm in result["arms"] for run in arm["runs"]]
    return [run for run in runs if (run["base"], run["seed"]) not in newer]


def _experiment(experiment: Experiment, runs: list[dict[str, Any]]) -> dict[str, Any]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run["seed"], run["base"])):
        groups[tuple(run[name] for name in NAMES)].append({n: v for n, v in run.items() if n not in NAMES})
    return {
        "task": experiment.task,
        "block_length": experiment.block_length,
        "num_problems": experiment.num_test,
        "thresholds": experiment.thresholds,
        "replicates": sorted({(run["base"], run["seed"]) for run in runs}, key=lambda pair: pair[::-1]),
        "arms": [_arm(names, group) for names, group in groups.items()],
    }


def _arm(names: tuple[str, ...], runs: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [r["ratio"]["value"] for r in runs]
    best = [r["ratio_at_best"]["value"] for r in runs]
    return {
        **dict(zip(NAMES, names, strict=True)),
        "accuracy": np.mean([r["accuracy"] for r in runs], axis=0).round(5).tolist(),
        "tokens_per_pass": np.mean([r["tokens_per_pass"] for r in runs], axis=0).round(4).tolist(),
        "ratio": _spread(ratios),
        "ratio_at_best": _spread(best),
        "best_difference": _spread([r["best_difference"]["value"] for r in runs]),
        "gains": [_spread([r["gains"][t]["value"] for r in runs]) for t in range(len(runs[0]["gains"]))],
        "half_the_passes": sum(b is not None and b >= 2.0 for b in best),
        "clearly_ahead": sum(any(g["apart"] for g in r["gains"]) for r in runs),
        "clearly_behind": sum(any(g["behind"] for g in r["gains"]) for r in runs),
        "runs": runs,
    }


def _run(part: Loaded, baseline: Loaded) -> dict[str, Any]:
    """ratio, ratios, ratio_at_best: tokens per pass over SeqD's at LEVEL, at LEVELS and at SeqD's best accuracy.
    best_difference: best accuracy minus SeqD's. gains: accuracy minus SeqD's at the tokens per pass that SeqD has at
    each threshold. apart, behind: the 95 % intervals of the two accuracies do not overlap there."""
    found = compare(baseline.curves, part.curves, accuracy_levels=LEVELS)
    rates, accuracy = part.curves.rates["tokens_per_pass"], part.curves.accuracy
    base_rates, base_accuracy = baseline.curves.rates["tokens_per_pass"], baseline.curves.accuracy
    gains = []
    for rate in base_rates[0]:
        mine, theirs = crossing(accuracy, rates, rate), crossing(base_accuracy, base_rates, rate)
        a, b = estimate(mine), estimate(theirs)
        known = None not in (a.low, b.low)
        gains.append(
            {
                "rate": float(rate),
                **asdict(estimate(mine - theirs)),
                "apart": bool(known and a.low > b.high),  # type: ignore[operator]
                "behind": bool(known and a.high < b.low),  # type: ignore[operator]
            }
        )
    return {
        "base": part.replicate[0],
        "seed": part.replicate[1],
        "accuracy": accuracy[0].round(5).tolist(),
        "tokens_per_pass": rates[0].round(4).tolist(),
        "ratio": asdict(found.levels[LEVELS.index(LEVEL)].ratio),
        "ratios": [asdict(level.ratio) for level in found.levels],
        "ratio_at_best": asdict(found.best.ratio),
        "best_difference": asdict(estimate(accuracy.max(1) - base_accuracy.max(1))),
        "gains": gains,
        "facts": {n: v for n, v in part.facts.items() if v == v},
    }


def _spread(values: list[float | None]) -> dict[str, Any]:
    """Mean over the replicates where the value is defined, with its standard error."""
    known = [v for v in values if v is not None]
    error = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    return {"mean": statistics.fmean(known) if known else None, "standard_error": error, "n": len(known)}


# -- tables and plots


def _table(name: str, result: dict[str, Any]) -> str:
    """Markdown."""
    head = ["method", "replicates", *(f"{t:g}" for t in result["thresholds"])]
    head += [
        f"ratio at {100 * LEVEL:.0f} %",
        "ratio at SeqD's best",
        "best accuracy over SeqD's",
        *(f"gain at {t:g}" for t in result["thresholds"]),
    ]
    head += ["ahead / behind"]
    lines = [
        f"\n### {name}: {_count(result)}, {result['num_problems']} problems\n",
        "accuracy % @ tokens per pass; gain: percentage points over SeqD at the same tokens per pass\n",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for arm in result["arms"]:
        cells = [arm["title"], str(len(arm["runs"]))]
        cells += [f"{100 * a:.1f} @ {r:.2f}" for a, r in zip(arm["accuracy"], arm["tokens_per_pass"], strict=True)]
        count = len(arm["runs"])
        cells += [_say(arm["ratio"], 1, ".2f", count), _say(arm["ratio_at_best"], 1, ".2f", count)]
        cells += [_say(arm["best_difference"], 100, "+.1f", count)]
        cells += [_say(gain, 100, "+.1f", count) for gain in arm["gains"]]
        cells += [f"{arm['clearly_ahead']} / {arm['clearly_behind']}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _count(result: dict[str, Any]) -> str:
    count = len(result["replicates"])
    return f"{count} replicate{'s' if count != 1 else ''}"


def _say(spread: dict[str, Any], scale: float, form: str, count: int) -> str:
    if spread["mean"] is None:
        return "-"
    text = f"{scale * spread['mean']:{form}}"
    if spread["standard_error"] is not None:
        text += f" ± {scale * spread['standard_error']:{form.lstrip('+')}}"
    return text if spread["n"] == count else f"{text} ({spread['n']} of {count})"


def _plot(name: str, result: dict[str, Any]) -> bytes:
    """Mean curves over the replicates, and each replicate's as a thin line."""
    from pipelines.report.plots import SCREEN, colour, figure, line, marker, png

    made, axes = figure(SCREEN, 12, 5.5)
    for index, arm in enumerate(result["arms"]):
        look = {"color": colour(index, False), "linestyle": line(index)}
        for run in arm["runs"]:
            axes.plot(run["tokens_per_pass"], 100 * np.array(run["accuracy"]), linewidth=0.5, alpha=0.35, **look)
        axes.plot(
            arm["tokens_per_pass"], 100 * np.array(arm["accuracy"]), marker=marker(index), markersize=4,
            linewidth=1.6, label=arm["title"], **look,
        )  # fmt: skip
    axes.set_xlabel("tokens per pass (reference passes counted by their FLOPs)")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"{name}: mean over {_count(result)}, {result['num_problems']} problems each")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return png(made)
