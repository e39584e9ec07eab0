"""The sentence at the top of a report: by the same rules whichever method is ahead."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipelines.report.markdown import markdown, table
from pipelines.report.verdict import verdict
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
