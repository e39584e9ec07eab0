"""The sentence at the top of a report: by the same rules whichever method is ahead."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from pipelines.report.markdown import markdown, table
from pipelines.report.verdict import verdict
from rcd_core.evaluation.outcomes import Array, Outcomes
from rcd_core.evaluation.statistics import compare, resample
from tests.pipelines.report.made_results import made


def test_a_faster_method_with_its_interval_and_how_to_use_it() -> None:
    results = made(speed=1.5)
    said = verdict(results)
    ratio = results["comparisons"][0]["tokens_per_pass"]["best"]["ratio"]
    shares = [round(100 * (1 - 1 / ratio[end])) for end in ("value", "low", "high")]
    assert re.findall(r"(\d+) % fewer passes|interval: (\d+) % to (\d+) %", said) == [
        (str(shares[0]), "", ""),
        ("", str(shares[1]), str(shares[2])),
    ]
    advice = results["comparisons"][0]["advice"]
    threshold = float(re.findall(r"confidence threshold of ([\d.]+),", said)[0])
    assert threshold == advice["arm"]["threshold"] and f"On the other {advice['measured_on']} it gives" in said
    assert f"{100 * advice['arm']['accuracy']:.1f}".removesuffix(".0") in said


def test_results_of_older_releases_say_that_the_threshold_was_chosen_on_the_same_problems() -> None:
    results = made(speed=1.5)
    del results["comparisons"][0]["advice"]
    assert "chosen on the same problems" in verdict(results)


@pytest.mark.parametrize(
    ("changes", "opening"),
    [
        ({"speed": 0.75}, "No method is faster than SeqD"),
        ({"skill": 0.2}, "No method is faster than SeqD"),
        ({"speed": 1.0, "reference": 0}, "No difference could be shown"),
        ({"speed": 1.5, "skill": 0.46}, "RCD, zero start needs"),
    ],
)
def test_what_else_there_is_to_say(changes: dict[str, Any], opening: str) -> None:
    assert verdict(made(**changes)).startswith(opening)


def test_equal_methods_are_not_called_slower() -> None:
    """Of two equal methods every second one never reaches the other's best accuracy, a maximum over thresholds."""
    generator = np.random.default_rng(0)
    accuracy, rate, num_problems = [0.6, 0.72, 0.82, 0.88, 0.905, 0.91], [6, 5, 4, 3.2, 2.6, 2.2], 400
    said = []
    for _ in range(40):
        difficulty = generator.random(num_problems)
        curves = []
        for _ in range(2):
            mixed = 0.6 * difficulty + 0.4 * generator.random((len(rate), num_problems))
            cuts = np.quantile(mixed.ravel(), accuracy)
            curves.append(resample(outcomes((mixed < cuts[:, None]).astype(float), np.array(rate)), 300))
        results = made()
        results["comparisons"][0]["tokens_per_pass"] = asdict(compare(*curves))
        said.append(verdict(results))
    assert any("its own best accuracy differs by -" in text for text in said)
    assert sum(text.startswith("No method is faster") for text in said) <= 4


def outcomes(correct: Array, rate: Array) -> Outcomes:
    """correct (T, N), tokens per pass (T,)."""
    tokens, none = np.full(correct.shape, 36.0), np.zeros(correct.shape)
    counts = {"tokens": tokens, "denoise": tokens / rate[:, None], "correct": correct[:, :, None]}
    rest = ("reference", "prefill", "store", "reference_cost", "reference_cost_by_parameters", "seconds")
    ids = tuple(f"{i:04d}" for i in range(correct.shape[1]))
    thresholds = tuple(np.linspace(0.5, 0.99, len(rate)).tolist())
    return Outcomes(thresholds=thresholds, example_ids=ids, **counts, **dict.fromkeys(rest, none))


def test_a_gain_below_the_best_accuracy_is_no_gain_at_it() -> None:
    results = made(speed=1.5)
    best = results["comparisons"][0]["tokens_per_pass"]["best"]
    best["ratio"], best["arm"] = {"value": None, "low": None, "high": None}, "below"
    level = results["comparisons"][0]["tokens_per_pass"]["levels"][0]
    level["ratio"] = {"value": 1.5, "low": 1.4, "high": 1.6}
    said = verdict(results)
    assert f"33 % fewer passes than SeqD at {100 * level['accuracy']:g} % accuracy" in said
    assert "not shown to be faster at SeqD's best accuracy" in said


def test_a_method_that_is_always_better_is_told_to_be_measured_at_lower_thresholds() -> None:
    """Its curve does not come down to the baseline's best accuracy, so that there is no ratio."""
    results = made(speed=1.5)
    best = results["comparisons"][0]["tokens_per_pass"]["best"]
    best["ratio"], best["arm"] = {"value": None, "low": None, "high": None}, "above"
    results["comparisons"][0]["tokens_per_pass"]["levels"] = []
    assert verdict(results).endswith("evaluate.thresholds needs lower ones to tell.")


def test_a_task_that_nobody_solves_is_not_compared() -> None:
    results = made()
    for method in results["arms"]:
        for point in method["curve"]:
            point["accuracy"] /= 3
    assert verdict(results).startswith("No model solves this task: the best accuracy is 3")


def test_markdown_has_the_verdict_first_and_every_figure() -> None:
    results = made()
    page = markdown(results)
    heading, first = page.split("\n\n")[:2]
    assert heading.startswith("# <made up>") and first == f"**{verdict(results)}**"
    for method in results["arms"]:
        for point in method["curve"]:
            assert f"{100 * point['accuracy']:.1f} @ {point['tokens_per_pass']:.2f}" in page
    assert table((["a|b"], [["1\n2"]])) == "| a\\|b |\n| --- |\n| 1<br>2 |"
