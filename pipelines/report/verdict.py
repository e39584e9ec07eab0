"""The verdict of an evaluation in one to three sentences: which method to use, that no difference could be shown, or
that no model solves the task."""

from __future__ import annotations

import math
from typing import Any

from pipelines.report.text import Results, percent, titles

SOLVED = 0.5  # a best accuracy below this says more about the base than about the methods


def verdict(results: Results) -> str:
    """For the terminal, the page and the Markdown report. The same rules whichever method is ahead."""
    best = max(((p["accuracy"], method["title"]) for method in results["arms"] for p in method["curve"]), default=None)
    if best is None:
        return "No method was evaluated."
    if not solved(results):
        return (
            f"No model solves this task: the best accuracy is {percent(best[0])} ({best[1]}). "
            "Train the base longer, or make the task easier, before you compare methods."
        )
    case, f, level = _subject(results)
    if f is None:
        return f"The best accuracy is {percent(best[0])} ({best[1]}). There is no baseline to compare with."
    among = f" (the best of {len(results['comparisons'])} methods)" if len(results["comparisons"]) > 1 else ""
    if case == "faster":
        return (
            f"{f.method} needs {_fewer(f.ratio)} fewer passes than {f.baseline} at {f.baseline}'s best accuracy of "
            f"{percent(f.accuracy)} (95 % interval: {_fewer(f.low)} to {_fewer(f.high)}){among}. {_advice(f)}"
        )
    if level is not None:
        return (
            f"{f.method} needs {_fewer(level['ratio']['value'])} fewer passes than {f.baseline} at "
            f"{percent(level['accuracy'])} accuracy{among}, but is not shown to be faster at {f.baseline}'s best "
            f"accuracy of {percent(f.accuracy)}: {f.at_best}."
        )
    if case == "slower":
        return f"No method is faster than {f.baseline} at its best accuracy. The best of them, {f.method}: {f.at_best}."
    best_accuracy = f"{f.baseline}'s best accuracy of {percent(f.accuracy)}"
    return f"No difference could be shown at {best_accuracy}. {f.method}: {f.at_best}."


def solved(results: Results) -> bool:
    """Whether some method solves enough problems that a comparison says something about the methods."""
    return any(p["accuracy"] >= SOLVED for method in results["arms"] for p in method["curve"])


def subject(results: Results) -> dict[str, Any] | None:
    """The comparison that the verdict is about; None without any."""
    finding = _subject(results)[1]
    return finding.comparison if finding else None


def _subject(results: Results) -> tuple[str, _Finding | None, dict[str, Any] | None]:
    """(faster, partly, slower or unclear; the method; for `partly` the level at which it is faster)."""
    found = [_Finding(results, comparison) for comparison in results["comparisons"]]
    if not found:
        return "", None, None
    if faster := [f for f in found if f.low is not None and f.low > 1.0]:
        return "faster", max(faster, key=_by_ratio), None
    partly = [(f, level) for f in found for level in f.levels if (level["ratio"]["low"] or 0.0) > 1.0]
    if partly:
        return "partly", *max(partly, key=lambda pair: pair[1]["ratio"]["value"])
    slower = [f for f in found if f.worse or (f.high is not None and f.high < 1.0)]
    if len(slower) == len(found):
        return "slower", max(found, key=_by_ratio), None
    return "unclear", max((f for f in found if f not in slower), key=_by_ratio), None


class _Finding:
    """A method against its baseline, at the baseline's best accuracy."""

    def __init__(self, results: Results, comparison: dict[str, Any]) -> None:
        self.comparison = comparison
        names, measured = titles(results), comparison["tokens_per_pass"]
        self.method, self.baseline = names[comparison["arm"]], names[comparison["baseline"]]
        self.accuracy: float = measured["best"]["accuracy"]
        ratio = measured["best"]["ratio"]
        self.ratio, self.low, self.high = ratio["value"], ratio["low"], ratio["high"]
        self.never, self.always = (measured["best"]["arm"] == side for side in ("below", "above"))
        # Not in results of older releases. A best accuracy is a maximum: every second equal method never reaches it.
        self.difference: dict[str, float] | None = measured.get("best_difference")
        self.worse = self.never and (self.difference is None or self.difference["high"] < 0.0)
        self.levels: list[dict[str, Any]] = measured["levels"]
        self.curve = next(method["curve"] for method in results["arms"] if method["name"] == comparison["arm"])

    @property
    def at_best(self) -> str:
        if self.always:
            return "its accuracy is above that at every threshold, so evaluate.thresholds needs lower ones to tell"
        if self.ratio is None:
            return self._below if self.never else "the curves do not meet there"
        if self.low is None:
            return f"{self.ratio:.2f} times the tokens per pass there (no interval)"
        return f"{self.ratio:.2f} times the tokens per pass there ({self.low:.2f} to {self.high:.2f})"

    @property
    def _below(self) -> str:
        if self.difference is None:
            return "its accuracy is below that at every threshold"
        value, low, high = (100 * self.difference[end] for end in ("value", "low", "high"))
        return f"its own best accuracy differs by {value:+.1f} percentage points ({low:+.1f} to {high:+.1f})"


def _by_ratio(f: _Finding) -> float:
    return f.ratio or (math.inf if f.always else 0.0)


def _fewer(ratio: float | None) -> str:
    """Passes that are saved at so many times the tokens per pass."""
    return f"{100 * (1 - 1 / ratio):.0f} %" if ratio else "an unknown share"


def _advice(f: _Finding) -> str:
    """A threshold, with what it gives on problems that its choice did not use."""
    advice = f.comparison.get("advice")
    if advice is None:  # of an older release, or of a single problem
        return _advice_on_the_same_problems(f)
    if not advice["reaches"]:
        return (
            f"No threshold is advised: on the {advice['chosen_on']} problems that thresholds are chosen on, none of "
            f"those measured is as accurate as {f.baseline}."
        )
    own, base = advice["arm"], advice["baseline"]
    return (
        f"Use it with a confidence threshold of {own['threshold']:g}, chosen on half of the problems. On the other "
        f"{advice['measured_on']} it gives {_at(own)}, and {f.baseline} at {base['threshold']:g}, chosen likewise, "
        f"{_at(base)}."
    )


def _at(point: dict[str, Any]) -> str:
    return f"{percent(point['accuracy'])} at {point['tokens_per_pass']:.2f} tokens per pass"


def _advice_on_the_same_problems(f: _Finding) -> str:
    enough = [p for p in f.curve if p["accuracy"] >= f.accuracy]
    if not enough:
        return "Its accuracy there lies between two of the measured thresholds."
    p = max(enough, key=lambda p: p["tokens_per_pass"])
    return (
        f"Use it with a confidence threshold of {p['threshold']:g}: {_at(p)}, which may be a little too good, as the "
        "threshold was chosen on the same problems."
    )
