"""Logic grids in words: three people, each with one of three things in one of three places. Clues exclude a pair, offer
two, or link a thing with a place; together they have one solution, which the answer names pair by pair.

A row looks like this:

    {"question": "Mia, Tom and Ida have the drum, the lamp and the vase in the attic, the mill and the garden. Mia does
                  not have the lamp. Tom has the drum or the vase. The drum is not in the mill. The vase is in the
                  garden. Ida is in the attic or the mill. Tom is not in the garden. Who has what, and where?",
     "answer": "Mia has the vase in the garden. Tom has the drum in the attic. Ida has the lamp in the mill."}

Train and test differ in solution and clues, whatever the names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, permutations

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError
from rcd_core.tasks.base import Problem, draw_row
from rcd_core.tasks.words import PEOPLE, PLACES, SINGLE_THINGS, pick_several

_SIZE = 3
_KINDS = ("person", "thing", "place")
_ORDERS = list(permutations(range(_SIZE)))
_WORLDS = [(tuple(range(_SIZE)), things, places) for things in _ORDERS for places in _ORDERS]  # by person
World = tuple[tuple[int, ...], ...]
Clue = tuple[int, int, int, frozenset[int]]  # kind and number of an item; the kind and the numbers it may go with
_CLUE = re.compile(r"(?:The )?(\w+) (has|does not have|is in|is not in) the (\w+)(?: or the (\w+))?\.")
_STATEMENT = re.compile(r"(\w+) has the (\w+) in the (\w+)")


class Grid:
    name = "grid"
    about = "logic grids. A prompt has people, things, places and clues; the answer says who has what where."
    infill = False
    fields: tuple[str, ...] = ("question", "answer")

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        return draw_row(self.name, index, split, seed, 1 + 3 * _SIZE + len(_CLUES), _make)

    def problem(self, row: Mapping[str, str]) -> Problem:
        answer = row["answer"].strip()
        if len(_pairs(answer)) != _SIZE:
            raise UserError(f"the answer does not name {_SIZE} people, each with a thing and a place: {answer[:80]!r}")
        return Problem(prompt=row["question"].strip(), response=answer, answer=answer)

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        found = _STATEMENT.findall(completion)
        return len(found) == _SIZE and {tuple(pair) for pair in found} == _pairs(answer)

    def check(self, prompt: str, completion: str) -> bool:
        """Raises UserError for a prompt that is no problem of this task."""
        given, stop, clues = prompt.partition(". ")
        people, have, rest = given.partition(" have ")
        things, inside, places = rest.partition(" in ")
        if not (stop and have and inside):
            raise UserError(f"the prompt is no problem of {self.name}: {prompt[:80]!r}")
        names = [re.findall(r"\b(?!and\b|the\b)\w+", part) for part in (people, things, places)]
        answers = {person: (thing, place) for person, thing, place in _STATEMENT.findall(completion)}
        by_person = [answers.get(person, ("", "")) for person in names[0]]
        found = [names[0], [thing for thing, _ in by_person], [place for _, place in by_person]]
        if len(answers) != _SIZE or any(set(a) != set(b) for a, b in zip(found, names, strict=True)):
            return False
        return all(_agrees(clue, found) for clue in _CLUE.findall(clues))


def _agrees(clue: Sequence[str], found: Sequence[Sequence[str]]) -> bool:
    """clue: subject, verb, one or two objects. found: people, their things, their places."""
    subject, verb, one, other = clue
    kind = next((k for k, names in enumerate(found) if subject in names), None)
    if kind is None:
        raise UserError(f"a clue is about {subject!r}, which the prompt does not introduce")
    value = found[1 if "ha" in verb else 2][found[kind].index(subject)]
    return (value in (one, other)) != ("not" in verb)


def _pairs(text: str) -> set[tuple[str, ...]]:
    return {tuple(found) for found in _STATEMENT.findall(text)}


def _possible() -> Iterator[Clue]:
    """Every clue: an item of one kind goes with one or two of the three items of a later kind."""
    for kind, other in combinations(range(len(_KINDS)), 2):
        for item in range(_SIZE):
            for count in (1, 2):
                for numbers in combinations(range(_SIZE), count):
                    yield kind, item, other, frozenset(numbers)


_CLUES = list(_possible())


def _holds(clue: Clue, world: World) -> bool:
    kind, item, other, numbers = clue
    return world[other][world[kind].index(item)] in numbers


def _make(uniform: NDArray[np.float64]) -> tuple[str, str, str]:
    draws = uniform.tolist()
    world = _WORLDS[int(draws[0] * len(_WORLDS))]
    names = [pick_several(items, draws[1 + _SIZE * i : 1 + _SIZE * (i + 1)]) for i, items in enumerate(_ITEMS)]
    clues = _unique([_CLUES[i] for i in np.argsort(draws[-len(_CLUES) :]).tolist() if _holds(_CLUES[i], world)])
    people, things, places = names
    given = [_listed(people), _listed([f"the {t}" for t in things]), _listed([f"the {p}" for p in places])]
    sentences = [f"{given[0]} have {given[1]} in {given[2]}.", *(_in_words(clue, names) for clue in clues)]
    answer = " ".join(f"{people[i]} has the {things[world[1][i]]} in the {places[world[2][i]]}." for i in range(_SIZE))
    content = f"{world} {[(*clue[:3], sorted(clue[3])) for clue in clues]}"
    return content, " ".join([*sentences, "Who has what, and where?"]), answer


_ITEMS = (PEOPLE, SINGLE_THINGS, PLACES)


def _unique(clues: Sequence[Clue]) -> list[Clue]:
    """Of clues that together have one solution, the first ones that are needed: each rules out a world, and no other
    one makes it superfluous."""
    left, chosen = list(_WORLDS), []
    for clue in clues:
        remaining = [world for world in left if _holds(clue, world)]
        if len(remaining) < len(left):
            left = remaining
            chosen.append(clue)
    for clue in list(chosen):
        others = [c for c in chosen if c is not clue]
        if sum(all(_holds(c, world) for c in others) for world in _WORLDS) == 1:
            chosen = others
    return chosen


def _in_words(clue: Clue, names: Sequence[Sequence[str]]) -> str:
    kind, item, other, numbers = clue
    verb, negated = ("has", "does not have") if other == 1 else ("is in", "is not in")
    subject = names[kind][item] if kind == 0 else f"The {names[kind][item]}"
    allowed = [f"the {names[other][n]}" for n in sorted(numbers)]
    if len(allowed) == 1:
        return f"{subject} {verb} {allowed[0]}."
    (left,) = set(range(_SIZE)) - numbers
    if (item + left) % 2:  # both say the same; which one is used follows from the clue
        return f"{subject} {negated} the {names[other][left]}."
    return f"{subject} {verb} {allowed[0]} or {allowed[1]}."


def _listed(items: Sequence[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}"
