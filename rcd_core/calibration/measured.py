"""What was measured on tasks that residuals do and do not help, and what that says about a model that has not been
trained with them yet. Figures and methods: tests/benchmarks/evidence/README.md."""

from __future__ import annotations

from typing import NamedTuple


class Measured(NamedTuple):
    """Plain models of a task. thrown_away, resolved: `information_per_token` and `resolved` of information.py. gain:
    tokens per pass of the demo's method over those of plain decoding, at 90 % accuracy or the nearest that both reach.
    All as (smallest, largest)."""

    task: str
    thrown_away: tuple[float, float]
    resolved: tuple[float, float]
    gain: tuple[float, float]

    @property
    def useful(self) -> tuple[float, float]:
        """The smaller of the two, at both ends."""
        low, high = (min(pair) for pair in zip(self.thrown_away, self.resolved, strict=True))
        return low, high


MEASURED = (
    Measured("digits in any order, row by row", (3.09, 3.09), (0.00, 0.00), (1.00, 1.00)),
    Measured("word problems in equations, blocks of 8", (0.11, 0.11), (0.03, 0.03), (1.00, 1.00)),
    Measured("a walk round a ring", (0.14, 0.14), (0.83, 0.83), (0.80, 0.80)),
    Measured("word problems in equations, blocks of 32", (0.39, 0.39), (0.17, 0.17), (0.97, 0.97)),
    Measured("6x6 Sudoku in a text, three bases", (2.24, 2.65), (0.23, 0.35), (1.26, 1.31)),
    Measured("6x6 Sudoku without boxes", (5.90, 5.90), (0.32, 0.32), (1.34, 1.34)),
    Measured("6x6 Sudoku, nine bases", (4.15, 4.76), (0.29, 0.56), (1.29, 1.54)),
)
THRESHOLD = 0.9  # the confidence threshold of all of them; a stricter one discards more
_LEAST_GAIN = 1.05
NO_GAIN = max(m.useful[1] for m in MEASURED if m.gain[1] < _LEAST_GAIN)  # the largest value without a gain
GAIN = min(m.useful[0] for m in MEASURED if m.gain[0] >= _LEAST_GAIN)  # the smallest with one


def outlook(useful: float) -> str:
    """What to expect of residuals, for `useful` of information.py."""
    if useful <= NO_GAIN:
        return f"No gain is to be expected: models with up to {NO_GAIN:g} gained nothing."
    if useful >= GAIN:
        return f"A gain is likely: models with {GAIN:g} or more gained. They were tiny; a pilot run will tell."
    return f"Not known: no model between {NO_GAIN:g} and {GAIN:g} was measured."
