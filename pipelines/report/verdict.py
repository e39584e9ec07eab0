"""The verdict of an evaluation in one to three sentences: which method to use, that no difference could be shown, or
that no model solves the task."""

from __future__ import annotations

from typing import Any

from pipelines.report.text import Results, percent, titles

SOLVED = 0.5  # a best accuracy below this says more about the base than about the methods


def verdict(results: Results) -> str:
    """For the terminal, the page and the Markdown report. The same rules whichever method is ahead."""
    best = max(((p["accuracy"], method["title"]) for method in results["arms"] for p in method["curve"]), default=None)
    if best is None:
        return "No method was evaluated."
    if best[0] < SOLVED:
        return (
            f"No model solves this task: the best accuracy is {percent(best[0])} ({best[1]}). "
            "Train the base longer, or make the task easier, before you compare methods."
        )
    if not results["comparisons"]:
        return f"The best accuracy is {percent(best[0])} ({best[1]}). There is no baseline to compare with."
    found = [_Finding(results, comparison) for comparison in results["comparisons"]]
    among = f" (the best of {len(found)} methods)" if len(found) > 1 else ""
    faster = [f for f in found if f.low is not None and f.low > 1.0]
    if faster:
        f = max(faster, key=lambda f: f.ratio or 0.0)
        return (
            f"{f.method} needs {_fewer(f.ratio)} fewer passes than {f.baseline} at {f.baseline}'s best accuracy of "
            f"{percent(f.accuracy)} (95 % interval: {_fewer(f.low)} to {_fewer(f.high)}){among}. {_advice(f)}"
        )
    partly = [(f, level) for f in found for level in f.levels if (level["ratio"]["low"] or 0.0) > 1.0]
    if partly:
        f, level = max(partly, key=lambda pair: pair[1]["ratio"]["value"])
        return (
            f"{f.method} needs {_fewer(level['ratio']['value'])} fewer passes than {f.baseline} at "
            f"{percent(level['accuracy'])} accuracy{among}, but is not shown to be faster at {f.baseline}'s best "
            f"accuracy of {percent(f.accuracy)}: {f.at_best}."
        )
    slower = [f for f in found if f.never or (f.high is not None and f.high < 1.0)]
    if len(slower) == len(found):
        f = max(found, key=lambda f: f.ratio or 0.0)
        return f"No method is faster than {f.baseline} at its best accuracy. The best of them, {f.method}: {f.at_best}."
    f = max((f for f in found if f not in slower), key=lambda f: f.ratio or 0.0)
    best_accuracy = f"{f.baseline}'s best accuracy of {percent(f.accuracy)}"
    return f"No difference could be shown at {best_accuracy}. {f.method}: {f.at_best}."


class _Finding:
    """A method against its baseline, at the baseline's best accuracy."""

    def __init__(self, results: Results, comparison: dict[str, Any]) -> None:
        names, measured = titles(results), comparison["tokens_per_pass"]
        self.method, self.baseline = names[comparison["arm"]], names[comparison["baseline"]]
        self.accuracy: float = measured["best"]["accuracy"]
        ratio = measured["best"]["ratio"]
        self.ratio, self.low, self.high = ratio["value"], ratio["low"], ratio["high"]
        self.never = measured["best"]["arm"] == "below"
        self.levels: list[dict[str, Any]] = measured["levels"]
        self.curve = next(method["curve"] for method in results["arms"] if method["name"] == comparison["arm"])

    @property
    def at_best(self) -> str:
        if self.ratio is None:
            return "its accuracy is below that at every threshold" if self.never else "the curves do not meet there"
        if self.low is None:
            return f"{self.ratio:.2f} times the tokens per pass there (no interval)"
        return f"{self.ratio:.2f} times the tokens per pass there ({self.low:.2f} to {self.high:.2f})"


def _fewer(ratio: float | None) -> str:
    """Passes that are saved at so many times the tokens per pass."""
    return f"{100 * (1 - 1 / ratio):.0f} %" if ratio else "an unknown share"


def _advice(f: _Finding) -> str:
    enough = [p for p in f.curve if p["accuracy"] >= f.accuracy]
    if not enough:
        return "Its accuracy there lies between two of the measured thresholds."
    p = max(enough, key=lambda p: p["tokens_per_pass"])
    return (
        f"Use it with a confidence threshold of {p['threshold']:g}: {percent(p['accuracy'])} at "
        f"{p['tokens_per_pass']:.2f} tokens per pass."
    )
