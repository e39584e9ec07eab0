"""A state followed over 3 to 6 steps in words: which of three things is where. Every sentence of the working follows
from the question, so nothing about its wording is left to chance.

A row looks like this:

    {"question": "The drum is in the attic. The lamp is in the mill. The vase is in the garden. Mia swaps the drum and
                  the lamp. Tom brings the vase to the attic. Ida swaps the lamp and the vase. Where is the lamp?",
     "answer": "Now the drum is in the mill and the lamp in the attic. Now the vase is in the attic. Now the lamp is in
                the attic and the vase in the attic.\\n#### attic"}

Train and test differ in the moves: a sequence of moves belongs to one split, whatever the names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError
from rcd_core.tasks.answers import MARKER
from rcd_core.tasks.base import Problem, draw_row
from rcd_core.tasks.words import PEOPLE, PLACES, SINGLE_THINGS, pick, pick_several

_NUM_THINGS, _NUM_PLACES = 3, 4
_FEWEST, _MOST = 3, 6
_PLACED = re.compile(r"The (\w+) is in the (\w+)\.")
_MOVED = re.compile(r"swaps the (\w+) and the (\w+)\.|brings the (\w+) to the (\w+)\.")
_ASKED = re.compile(r"Where is the (\w+)\?")
_PAIRS = ((0, 1), (0, 2), (1, 2))


class Chain:
    name = "chain"
    about = "following things that are moved. A prompt asks where one is; the answer ends with #### and a place."
    infill = False
    fields: tuple[str, ...] = ("question", "answer")

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        return draw_row(self.name, index, split, seed, 2 + _NUM_THINGS + _NUM_PLACES + 3 * _MOST, _make)

    def problem(self, row: Mapping[str, str]) -> Problem:
        response = row["answer"].strip()
        if final_words(response) is None:
            raise UserError(f"the answer does not end in '{MARKER} PLACE'")
        return Problem(prompt=row["question"].strip(), response=response, answer=f"{MARKER} {final_words(response)}")

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        expected = final_words(answer)
        return expected is not None and final_words(completion) == expected

    def check(self, prompt: str, completion: str) -> bool:
        """Raises UserError for a prompt that is no problem of this task."""
        at: dict[str, str] = dict(_PLACED.findall(prompt.partition("?")[0]))
        for one, other, thing, place in _MOVED.findall(prompt):
            if thing:
                at[thing] = place
            elif {one, other} <= at.keys():
                at[one], at[other] = at[other], at[one]
        asked = _ASKED.search(prompt)
        if asked is None or asked[1] not in at:
            raise UserError(f"the prompt is no problem of {self.name}: {prompt[:80]!r}")
        return final_words(completion) == at[asked[1]]


def final_words(text: str) -> str | None:
    """What stands behind the last marker, to the end of its line; None without a marker or without words."""
    _, marker, rest = text.rpartition(MARKER)
    line = rest.strip().split("\n")[0]
    return " ".join(line.casefold().split()).rstrip(".") or None if marker else None


def _make(uniform: NDArray[np.float64]) -> tuple[str, str, str]:
    draws = uniform.tolist()
    asked, things = int(draws[1] * _NUM_THINGS), pick_several(SINGLE_THINGS, draws[2 : 2 + _NUM_THINGS])
    places = pick_several(PLACES, draws[2 + _NUM_THINGS : 2 + _NUM_THINGS + _NUM_PLACES])
    moves = draws[2 + _NUM_THINGS + _NUM_PLACES :]
    at = list(range(_NUM_THINGS))  # places of the things
    sentences = [f"The {thing} is in the {places[place]}." for thing, place in zip(things, at, strict=True)]
    working, content = [], [str(asked)]
    for i in range(_FEWEST + int(draws[0] * (_MOST - _FEWEST + 1))):
        which, how, who = moves[3 * i : 3 * i + 3]
        content.append(_move(at, which, how))
        sentence, result = _in_words(content[-1], at, things, places)
        sentences.append(f"{pick(PEOPLE, who)} {sentence}")
        working.append(result)
    question = " ".join([*sentences, f"Where is the {things[asked]}?"])
    return " ".join(content), question, f"{' '.join(working)}\n{MARKER} {places[at[asked]]}"


def _move(at: list[int], which: float, how: float) -> str:
    """Swap two things, "s01", or bring one to another place, "b03". Changes `at`."""
    if which < 0.5:
        one, other = _PAIRS[int(how * len(_PAIRS))]
        at[one], at[other] = at[other], at[one]
        return f"s{one}{other}"
    choices = [(t, p) for t in range(_NUM_THINGS) for p in range(_NUM_PLACES) if at[t] != p]
    thing, place = choices[int(how * len(choices))]
    at[thing] = place
    return f"b{thing}{place}"


def _in_words(move: str, at: Sequence[int], things: Sequence[str], places: Sequence[str]) -> tuple[str, str]:
    """(what happens, the sentence of the working)."""
    one, other = int(move[1]), int(move[2])
    if move[0] == "b":
        return (
            f"brings the {things[one]} to the {places[other]}.",
            f"Now the {things[one]} is in the {places[other]}.",
        )
    first, second = (f"the {things[t]}" for t in (one, other))
    here, there = (places[at[t]] for t in (one, other))
    return f"swaps {first} and {second}.", f"Now {first} is in the {here} and {second} in the {there}."
