"""Worded arithmetic in two to four steps, with the working spelled out.

A row looks like this:

    {"question": "Ben has 7 pears. He finds 5 more. He gives away 4. How many pears does Ben have now?",
     "answer": "7+5=12\\n12-4=8\\n#### 8"}

Numbers stay within 0..99. Train and test differ in the calculations, not only in the wording: a chain such as 7+5-4
belongs to one split, whatever the names and things.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rcd_core.tasks.base import draw_row
from rcd_core.tasks.gsm import NumberTask

_PEOPLE = (("Ben", "He"), ("Mia", "She"), ("Tom", "He"), ("Eva", "She"), ("Sam", "He"), ("Ana", "She"))
_THINGS = ("pears", "coins", "books", "cards", "shells", "stamps", "keys", "plums")
_WORDS = {
    "+": ("{who} finds {n} more.", "{who} buys {n} more.", "{who} gets {n} from a friend."),
    "-": ("{who} gives away {n}.", "{who} loses {n}.", "{who} sells {n}."),
    "*": ("{who} then has {n} times as many.", "The number grows {n} times."),
}
_PATTERNS = [
    (op, re.escape(words).replace(r"\{who\}", r"\w+").replace(r"\{n\}", r"(\d+)"))
    for op, several in _WORDS.items()
    for words in several
]
_MAX_STEPS = 4
_LARGEST = 99
Step = tuple[str, int]  # operator and operand


class Arithmetic(NumberTask):
    name = "arithmetic"
    about = "worded arithmetic. A prompt is a question about amounts; the answer ends with #### and a number."

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        return draw_row(self.name, index, split, seed, 4 + 3 * _MAX_STEPS, _make)

    def check(self, prompt: str, completion: str) -> bool | None:
        """None: the question is no generated one."""
        value = _solved(prompt)
        return None if value is None else self.grade(prompt, completion, f"#### {value}")


def _solved(question: str) -> int | None:
    """The value of a question made of the sentences above."""
    sentences = re.findall(r"[^.?]+[.?]", question)
    if len(sentences) < 3:
        return None
    first, *steps, last = sentences
    start = re.fullmatch(r"\w+ has (\d+) \w+\.", first.strip())
    if start is None or not last.strip().startswith("How many"):
        return None
    value = int(start[1])
    for sentence in steps:
        step = next((s for s in map(partial(_read, sentence.strip()), _PATTERNS) if s), None)
        if step is None:
            return None
        value = _apply(value, *step)
    return value


def _read(sentence: str, pattern: tuple[str, str]) -> Step | None:
    found = re.fullmatch(pattern[1], sentence)
    return (pattern[0], int(found[1])) if found else None


def _make(uniform: NDArray[np.float64]) -> tuple[str, str, str]:
    draws = uniform.tolist()
    start, steps = _chain(draws[2:])
    return f"{start}{steps}", *_in_words(start, steps, draws)


def _chain(draws: Sequence[float]) -> tuple[int, list[Step]]:
    """A start and 2.._MAX_STEPS steps whose values stay within 1.._LARGEST. Uses two draws, and three per step."""
    value = start = 2 + int(draws[0] * 29)
    steps: list[Step] = []
    for i in range(2 + int(draws[1] * (_MAX_STEPS - 1))):
        which, size = draws[2 + 3 * i : 4 + 3 * i]
        options = [("*", 2, _LARGEST // value), ("+", 1, _LARGEST - value), ("-", 1, value - 1)]
        options = [(op, low, min(high, 3 if op == "*" else 9)) for op, low, high in options if high >= low]
        op, low, high = _pick(options, which)
        n = low + int(size * (high - low + 1))
        value = _apply(value, op, n)
        steps.append((op, n))
    return start, steps


def _in_words(start: int, steps: Sequence[Step], draws: Sequence[float]) -> tuple[str, str]:
    """(question, answer)."""
    name, pronoun = _pick(_PEOPLE, draws[0])
    things = _pick(_THINGS, draws[1])
    sentences, working, value = [f"{name} has {start} {things}."], [], start
    for i, (op, n) in enumerate(steps):
        sentences.append(_pick(_WORDS[op], draws[6 + 3 * i]).format(who=pronoun, n=n))
        result = _apply(value, op, n)
        working.append(f"{value}{op}{n}={result}")
        value = result
    question = " ".join([*sentences, f"How many {things} does {name} have now?"])
    return question, "\n".join([*working, f"#### {value}"])


def _apply(value: int, op: str, n: int) -> int:
    return value * n if op == "*" else value + n if op == "+" else value - n


def _pick(items: Sequence[Any], u: float) -> Any:
    return items[int(u * len(items))]
