"""A way followed over 24 steps in words, as infilling: a hunt through six rooms. The text names the room it starts in
and a clue for each step; the kind of a clue says which door to take, and the room behind it is to be filled in. Every
room follows from the one before, so nothing about an answer is left to chance.

A row looks like this, but for the number of steps ("?" is unknown):

    {"question": "Hunt from study: baker ? otter ? lemon ? Olga ? anvil ? harbour ?",
     "answer": "Hunt from study: baker lounge otter larder lemon pantry Olga study anvil nursery harbour larder"}

Train and test differ in the start and the kinds of the clues, whatever the words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError
from rcd_core.tasks.base import MASK_TEXT, Problem, draw_row
from rcd_core.tasks.words import ANIMALS, FOODS, PEOPLE, PLACES, SINGLE_THINGS, TRADES, pick

_STEPS = 24
_ROOMS = ("parlour", "pantry", "study", "nursery", "larder", "lounge")  # in a ring
# Words of a kind of clue, and the room behind its door from each room. Doors do not commute, so their order matters.
_DOORS = (
    (PEOPLE, (1, 2, 3, 4, 5, 0)),  # to the next room
    (ANIMALS, (5, 0, 1, 2, 3, 4)),  # to the room before
    (TRADES, (3, 4, 5, 0, 1, 2)),  # to the room opposite
    (SINGLE_THINGS, (1, 0, 3, 2, 5, 4)),  # between two rooms
    (FOODS, (5, 4, 3, 2, 1, 0)),  # between others
    (PLACES, (5, 2, 1, 4, 3, 0)),
)
_DOOR_OF = {word: number for number, (items, _) in enumerate(_DOORS) for word in items}
_HUNT = re.compile(r"Hunt from (\w+):((?: \w+ \?)+)")


class Chain:
    name = "chain"
    about = (
        f"hunts through six rooms: it writes a room for each {MASK_TEXT}. A prompt has the room it starts in and "
        f"{_STEPS} words, each with {MASK_TEXT} behind it; what kind of word it is says which door leads to that room."
    )
    infill = True
    fields: tuple[str, ...] = ("question", "answer")

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        return draw_row(self.name, index, split, seed, 1 + 2 * _STEPS, _make)

    def problem(self, row: Mapping[str, str]) -> Problem:
        question, answer = row["question"].strip(), row["answer"].strip()
        canvas = question.replace(" ?", MASK_TEXT)
        if not self.grade(canvas, answer, ""):
            raise UserError(f"the answer does not have the rooms that the question leads to: {answer[:60]!r}")
        return Problem(prompt=canvas, response=answer, answer=answer)

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        question = prompt.strip().replace(MASK_TEXT, " ?")
        found = _HUNT.fullmatch(question)
        clues = found[2].replace("?", "").split() if found else []
        if found is None or found[1] not in _ROOMS or not _DOOR_OF.keys() >= set(clues):
            raise UserError(f"the prompt is no problem of {self.name}: {question[:80]!r}")
        return completion.strip() == _filled(_ROOMS.index(found[1]), clues)

    def check(self, prompt: str, completion: str) -> bool:
        return self.grade(prompt, completion, "")


def _make(draws: NDArray[np.float64]) -> tuple[str, str, str]:
    start, *doors = (draws[: 1 + _STEPS] * len(_ROOMS)).astype(int).tolist()
    clues = [pick(_DOORS[door][0], u) for door, u in zip(doors, draws[1 + _STEPS :].tolist(), strict=True)]
    unknown = " ".join(f"{clue} ?" for clue in clues)
    return f"{start} {doors}", f"Hunt from {_ROOMS[start]}: {unknown}", _filled(start, clues)


def _filled(start: int, clues: list[str]) -> str:
    room, words = start, [f"Hunt from {_ROOMS[start]}:"]
    for clue in clues:
        room = _DOORS[_DOOR_OF[clue]][1][room]
        words += [clue, _ROOMS[room]]
    return " ".join(words)
