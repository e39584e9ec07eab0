"""Which confidence threshold to use, with figures that its choice has not flattered.

The best of several measured accuracies is too high on average: it was also the luckiest. So every second problem is
used to choose the thresholds, and the other problems to say what they give.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rcd_core.errors import UserError
from rcd_core.evaluation.outcomes import Outcomes, Point, curve


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A threshold for a method and one for its baseline. Fields are keys of results.json.

    chosen_on, measured_on: numbers of problems. arm, baseline: both at their thresholds, on the other problems.
    reaches: whether the method is as accurate as the baseline at its best, on the problems to choose on.
    """

    chosen_on: int
    measured_on: int
    reaches: bool
    arm: Point
    baseline: Point


def advise(baseline: Outcomes, method: Outcomes) -> Advice | None:
    """The baseline's most accurate threshold, and the method's fastest one that is as accurate; if there is none, its
    most accurate. None for a single problem. Raises UserError if the problems differ."""
    if baseline.example_ids != method.example_ids:
        raise UserError("results: the two arms have different example_id, so they cannot be compared in pairs")
    numbers = np.arange(len(method.example_ids))  # in the order of ids: drawn at random, or hashes of the content
    to_choose, to_measure = numbers[::2], numbers[1::2]
    if not len(to_measure):
        return None
    base, own = (curve(outcomes.of(to_choose)) for outcomes in (baseline, method))
    at_best = max(base, key=lambda p: (p.accuracy, p.tokens_per_pass))
    enough = [p for p in own if p.accuracy >= at_best.accuracy]
    if enough:
        chosen = max(enough, key=lambda p: p.tokens_per_pass)
    else:
        chosen = max(own, key=lambda p: (p.accuracy, p.tokens_per_pass))
    return Advice(
        chosen_on=len(to_choose),
        measured_on=len(to_measure),
        reaches=bool(enough),
        arm=_at(method.of(to_measure), chosen.threshold),
        baseline=_at(baseline.of(to_measure), at_best.threshold),
    )


def _at(outcomes: Outcomes, threshold: float) -> Point:
    return next(point for point in curve(outcomes) if point.threshold == threshold)
