"""Word problems with a worked solution in words: a text-like task with a vocabulary of one to two thousand tokens.

A row looks like this:

    {"question": "Mia keeps 7 lemons at the harbour. On Monday Tom brings 5 more lemons. Later Mia sells 4 to Eva.
                  How many lemons does Mia have now?",
     "answer": "Adding 5 to 7 gives 12 lemons. 12 without 4 is 8.\\n#### 8"}

Each step of the solution has one of several wordings of different lengths, which the question does not determine. So
tokens decoded in parallel must agree on one, as in real text. Numbers stay within 1..20, all but the first below 10.
Train and test differ in the calculations: a chain such as 7+5-4 belongs to one split, whatever the names and things.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rcd_core.tasks.base import draw_row
from rcd_core.tasks.gsm import NumberTask
from rcd_core.tasks.words import PEOPLE, PLACES, THINGS, pick, words

_TIMES = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_GAIN = (
    "On {time} {other} brings {n} more {things}.",
    "Then {who} finds {n} near the {place}.",
    "In the {place} {who} buys {n} from {other}.",
    "Later {other} sends {n} more.",
)
_LOSS = (
    "On {time} {who} gives {n} to {other}.",
    "Then {who} loses {n} in the {place}.",
    "At the {place} {n} of the {things} break.",
    "Later {who} sells {n} to {other}.",
)
_GAINED = (
    "{a} and {n} make {b}.",
    "Adding {n} to {a} gives {b} {things}.",
    "So {who} has {a} + {n} = {b}.",
    "With {n} more there are {b} {things} now.",
)
_LOST = (
    "{a} without {n} is {b}.",
    "Taking {n} from {a} leaves {b} {things}.",
    "So {who} has {a} - {n} = {b}.",
    "After losing {n} there are {b} {things} left.",
)
_MAX_STEPS = 3
_LARGEST = 20
_DRAWS_PER_STEP = 6
Step = tuple[int, int]  # sign (+1 or -1) and operand


class Stories(NumberTask):
    name = "stories"
    about = "word problems. A prompt is a short story with a question; the answer ends with #### and a number."

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        return draw_row(self.name, index, split, seed, 6 + _DRAWS_PER_STEP * _MAX_STEPS, _make)


def _make(uniform: NDArray[np.float64]) -> tuple[str, str, str]:
    draws = uniform.tolist()
    start, steps = _chain(draws)
    return f"{start}{steps}", *_in_words(start, steps, draws)


def _chain(draws: Sequence[float]) -> tuple[int, list[Step]]:
    """A start and 2.._MAX_STEPS steps whose values stay within 1.._LARGEST."""
    value = start = 2 + int(draws[0] * 11)
    steps: list[Step] = []
    for i in range(2 + int(draws[1] * (_MAX_STEPS - 1))):
        which, size = draws[6 + _DRAWS_PER_STEP * i : 8 + _DRAWS_PER_STEP * i]
        room = {+1: min(9, _LARGEST - value), -1: min(9, value - 1)}
        sign = +1 if room[-1] < 1 or (room[+1] >= 1 and which < 0.5) else -1
        n = 1 + int(size * room[sign])
        value += sign * n
        steps.append((sign, n))
    return start, steps


def _in_words(start: int, steps: Sequence[Step], draws: Sequence[float]) -> tuple[str, str]:
    """(question, answer)."""
    who, things, place = pick(PEOPLE, draws[2]), pick(THINGS, draws[3]), pick(PLACES, draws[4])
    sentences, working, value = [f"{who} keeps {start} {things} at the {place}."], [], start
    for i, (sign, n) in enumerate(steps):
        how, where, other, wording = draws[8 + _DRAWS_PER_STEP * i : 12 + _DRAWS_PER_STEP * i]
        words = {
            "who": who, "things": things, "n": n, "a": value, "b": value + sign * n, "place": pick(PLACES, where),
            "time": pick(_TIMES, where), "other": pick(PEOPLE, other),
        }  # fmt: skip
        sentences.append(pick(_GAIN if sign > 0 else _LOSS, how).format(**words))
        working.append(pick(_GAINED if sign > 0 else _LOST, wording).format(**words))
        value += sign * n
    question = " ".join([*sentences, f"How many {things} does {who} have now?"])
    return question, f"{' '.join(working)}\n#### {value}"
