"""A way followed over 24 steps in words: a hunt through six rooms. The question names the room it starts in and a clue
for each step; what kind of thing a clue is says which door to take. The answer has the room after each step. Every
room follows from the one before, so nothing about an answer is left to chance.

A row looks like this, but for the number of steps:

    {"question": "Hunt from study: baker otter lemon Olga anvil harbour",
     "answer": "Rooms: lounge larder pantry study nursery larder"}

Train and test differ in the start and the kinds of the clues, whatever the words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError
from rcd_core.tasks.base import Problem, draw_row
from rcd_core.tasks.words import ANIMALS, FOODS, PEOPLE, PLACES, SINGLE_THINGS, TRADES, pick

_STEPS = 24
ROOMS = ("parlour", "pantry", "study", "nursery", "larder", "lounge")  # in a ring
# kind of a clue -> its words, and the room behind its door from each room. Orders matter: doors do not commute.
_DOORS = (
    ("person", PEOPLE, (1, 2, 3, 4, 5, 0)),  # to the next room
    ("animal", ANIMALS, (5, 0, 1, 2, 3, 4)),  # to the room before
    ("trade", TRADES, (3, 4, 5, 0, 1, 2)),  # to the room opposite
    ("thing", SINGLE_THINGS, (1, 0, 3, 2, 5, 4)),  # rooms in pairs
    ("food", FOODS, (5, 4, 3, 2, 1, 0)),  # other pairs
    ("place", PLACES, (5, 2, 1, 4, 3, 0)),  # and others
)
_NUMBER = {word: number for number, (_, items, _) in enumerate(_DOORS) for word in items}
_QUESTION = re.compile(r"Hunt from (\w+):((?: \w+)+)")
_ANSWER = "Rooms:"


class Chain:
    name = "chain"
    about = (
        f"hunts through six rooms. A prompt has the room where a hunt starts and {_STEPS} words; the kind of each word, "
        "such as an animal or a food, says which door to take. The answer has the room after each."
    )
    infill = False
    fields: tuple[str, ...] = ("question", "answer")

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        return draw_row(self.name, index, split, seed, 1 + 2 * _STEPS, _make)

    def problem(self, row: Mapping[str, str]) -> Problem:
        question, answer = row["question"].strip(), row["answer"].strip()
        if not self.grade(question, answer, ""):
            raise UserError(f"the answer does not have the rooms that the question leads to: {answer[:60]!r}")
        return Problem(prompt=question, response=answer, answer=answer)

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        found = _QUESTION.fullmatch(prompt.strip())
        clues = found[2].split() if found else []
        if found is None or found[1] not in ROOMS or not _NUMBER.keys() >= set(clues):
            raise UserError(f"the prompt is no problem of {self.name}: {prompt[:80]!r}")
        return completion.split() == _answer(ROOMS.index(found[1]), [_NUMBER[clue] for clue in clues]).split()

    def check(self, prompt: str, completion: str) -> bool:
        return self.grade(prompt, completion, "")


def _make(draws: NDArray[np.float64]) -> tuple[str, str, str]:
    start, *doors = (draws[: 1 + _STEPS] * len(ROOMS)).astype(int).tolist()
    clues = [pick(_DOORS[door][1], u) for door, u in zip(doors, draws[1 + _STEPS :].tolist(), strict=True)]
    return f"{start} {doors}", f"Hunt from {ROOMS[start]}: {' '.join(clues)}", _answer(start, doors)


def _answer(room: int, doors: list[int]) -> str:
    rooms = []
    for door in doors:
        room = _DOORS[door][2][room]
        rooms.append(ROOMS[room])
    return f"{_ANSWER} {' '.join(rooms)}"
