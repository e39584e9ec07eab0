"""Worded arithmetic in two to four steps, with the working spelled out.

A row looks like this:

    {"question": "Ben has 7 pears. He finds 5 more. He gives away 4. How many pears does Ben have now?",
     "answer": "7+5=12\\n12-4=8\\n#### 8"}

Numbers stay within 0..99. Train and test differ in the sums themselves, not only in the wording: a chain such as
7+5-4 belongs to one split, whoever owns the pears.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rcd_core.errors import UserError
from rcd_core.noise import hash_key, uniforms
from rcd_core.tasks.answers import final_number, same_final_number
from rcd_core.tasks.base import Problem, belongs_to

_PEOPLE = (("Ben", "He"), ("Mia", "She"), ("Tom", "He"), ("Eva", "She"), ("Sam", "He"), ("Ana", "She"))
_THINGS = ("pears", "coins", "books", "cards", "shells", "stamps", "keys", "plums")
_WORDS = {
    "+": ("{who} finds {n} more.", "{who} buys {n} more.", "{who} gets {n} from a friend."),
    "-": ("{who} gives away {n}.", "{who} loses {n}.", "{who} sells {n}."),
    "*": ("{who} then has {n} times as many.", "The number grows {n} times."),
}
_MAX_STEPS = 4
_LARGEST = 99
Step = tuple[str, int]  # operator and operand


class Arithmetic:
    name = "arithmetic"
    infill = False
    fields: tuple[str, ...] = ("question", "answer")

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        for attempt in range(64):
            draws = uniforms(hash_key("arithmetic", seed, split, index, attempt), 4 + 3 * _MAX_STEPS).tolist()
            start, steps = _chain(draws[2:])
            if belongs_to(split, f"{start}{steps}"):
                return _in_words(start, steps, draws)
        raise RuntimeError(f"no {split} problem in 64 draws: index {index}, seed {seed}")  # a chance of 2**-64

    def problem(self, row: Mapping[str, str]) -> Problem:
        response = row["answer"].strip()
        number = final_number(response)
        if number is None:
            raise UserError("the answer does not end in '#### NUMBER'")
        return Problem(prompt=row["question"].strip(), response=response, answer=f"#### {number}")

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        return same_final_number(completion, answer)


def _chain(draws: Sequence[float]) -> tuple[int, list[Step]]:
    """A start and 2.._MAX_STEPS steps that stay within 1.._LARGEST; uses two draws and three per step."""
    value = start = 2 + int(draws[0] * 29)
    steps: list[Step] = []
    for i in range(2 + int(draws[1] * (_MAX_STEPS - 1))):
        which, size = draws[2 + 3 * i : 4 + 3 * i]
        options = [("*", 2, _LARGEST // value), ("+", 1, _LARGEST - value), ("-", 1, value - 1)]
        options = [(op, low, min(high, 3 if op == "*" else 9)) for op, low, high in options if high >= low]
        op, low, high = _pick(options, which)
        n = low + int(size * (high - low + 1))
        value = value * n if op == "*" else value + n if op == "+" else value - n
        steps.append((op, n))
    return start, steps


def _in_words(start: int, steps: Sequence[Step], draws: Sequence[float]) -> dict[str, str]:
    name, pronoun = _pick(_PEOPLE, draws[0])
    things = _pick(_THINGS, draws[1])
    sentences, working, value = [f"{name} has {start} {things}."], [], start
    for i, (op, n) in enumerate(steps):
        sentences.append(_pick(_WORDS[op], draws[6 + 3 * i]).format(who=pronoun, n=n))
        result = value * n if op == "*" else value + n if op == "+" else value - n
        working.append(f"{value}{op}{n}={result}")
        value = result
    question = " ".join([*sentences, f"How many {things} does {name} have now?"])
    return {"question": question, "answer": "\n".join([*working, f"#### {value}"])}


def _pick(items: Sequence[Any], u: float) -> Any:
    return items[int(u * len(items))]
