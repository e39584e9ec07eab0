"""Logic grids in words: four people, each with a thing, a food, an animal or a vehicle, in a room, a building, a
landscape or a city. The question has a place for three clues about each person: what the person has, where the person
is, and a link between the two. "is" says it, "not" excludes one, two words offer two, "? ?" says nothing; a link names
what the person has or where the person is, or both. Together the clues have one solution; the answer names all pairs.

A row looks like this ("/" ends a line):

    {"question": "Grid: Yara ? ? not cliff accordion Budapest / Paula is raspberry cellar mountain ? ? / Kira not raft
                  not porch owl lake / Tara is manuscript lounge theatre frog prison",
     "answer": "Pairs: Yara has the vehicle in the city / Paula has the food in the room / Kira has the animal in the
                landscape / Tara has the thing in the building"}

So Paula has a food, in a room or a landscape; Yara has a thing, or is in a city. Train and test differ in solution and
clues, whatever the words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations, permutations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError
from rcd_core.tasks.base import Problem, draw_row
from rcd_core.tasks.words import (
    ANIMALS,
    BUILDINGS,
    CITIES,
    FOODS,
    LANDSCAPES,
    PEOPLE,
    ROOMS,
    SINGLE_THINGS,
    VEHICLES,
    pick,
)

_SIZE = 4
_POSSESSIONS = {"thing": SINGLE_THINGS, "food": FOODS, "animal": ANIMALS, "vehicle": VEHICLES}
_PLACES = {"room": ROOMS, "building": BUILDINGS, "landscape": LANDSCAPES, "city": CITIES}
_QUESTION, _ANSWER, _END, _NOTHING = "Grid:", "Pairs:", " / ", "? ?"
_EVERY = frozenset(range(_SIZE))  # numbers of kinds
_NONE = frozenset[int]()


class _Clue(NamedTuple):
    """The person has one of these kinds of possessions, or is in one of these kinds of places."""

    person: int
    has: frozenset[int]
    where: frozenset[int]

    @property
    def slot(self) -> tuple[int, bool, bool]:
        """Of which a question has one clue."""
        return self.person, bool(self.has), bool(self.where)

    @property
    def direct(self) -> bool:
        return len(self.has) + len(self.where) == 1


class Grid:
    name = "grid"
    about = (
        "logic grids: four people, each with a thing, a food, an animal or a vehicle, in a room, a building, a "
        f"landscape or a city. A prompt is {_QUESTION} and a line for each person, with / between them. A line has the "
        "name and three clues of two words: what the person has, where the person is, and a possession and a place of "
        f"which one at least is right. A clue is 'is' and a word, 'not' and a word, two words, or {_NOTHING}; the "
        "answer has the kinds."
    )
    infill = False
    fields: tuple[str, ...] = ("question", "answer")

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        return draw_row(self.name, index, split, seed, 2 + len(_possible()[0]) + 7 * _SIZE, _make)

    def problem(self, row: Mapping[str, str]) -> Problem:
        question, answer = row["question"].strip(), row["answer"].strip()
        if not self.check(question, answer):
            raise UserError(f"the answer has not the pairs that the question's clues leave: {answer[:80]!r}")
        return Problem(prompt=question, response=answer, answer=answer)

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        return completion.split() == answer.split()

    def check(self, prompt: str, completion: str) -> bool:
        """Raises UserError for a prompt that is no problem of this task."""
        lines = _lines(prompt, _QUESTION)
        if lines is None:
            raise UserError(f"the prompt is no problem of {self.name}: {prompt[:80]!r}")
        clues = [clue for person, line in enumerate(lines) for clue in _clues(person, line[1:])]
        found = _lines(completion, _ANSWER)
        if found is None or [line[0] for line in found] != [line[0] for line in lines]:
            return False
        if any([*line[1:3], *line[4:6]] != ["has", "the", "in", "the"] for line in found):
            return False
        world = [_number(line[3], _POSSESSIONS) for line in found] + [_number(line[6], _PLACES) for line in found]
        each_once = sorted(world[:_SIZE]) == sorted(world[_SIZE:]) == sorted(_EVERY)
        return each_once and all(_holds(clue, np.array([world])).all() for clue in clues)

    def layout(self, text: str) -> str:
        """A question or an answer as lines for people."""
        return text.replace(_END, "\n")


def _lines(text: str, begin: str) -> list[list[str]] | None:
    """The seven words of each person's line; None for another form."""
    first, *words = text.split() or [""]
    lines = [line.split() for line in " ".join(words).split(_END)]
    return lines if first == begin and [len(line) for line in lines] == [7] * _SIZE else None


@cache
def _worlds() -> NDArray[np.int64]:
    """(576, 8): of each arrangement the kinds of the people's possessions, then of their places."""
    orders = list(permutations(range(_SIZE)))
    return np.array([has + where for has in orders for where in orders])


def _holds(clue: _Clue, worlds: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(W, 8) -> (W,)."""
    has, where = worlds[:, clue.person], worlds[:, _SIZE + clue.person]
    return np.isin(has, list(clue.has)) | np.isin(where, list(clue.where))


@cache
def _possible() -> tuple[list[_Clue], NDArray[np.bool_]]:
    """Every clue, and (clues, 576) in which arrangements it holds."""
    sets = [frozenset(kinds) for count in range(1, _SIZE) for kinds in combinations(range(_SIZE), count)]
    single = [kinds for kinds in sets if len(kinds) == 1]
    said = [(s, _NONE) for s in sets] + [(_NONE, s) for s in sets] + [(a, b) for a in single for b in single]
    clues = [_Clue(person, has, where) for person in range(_SIZE) for has, where in said]
    return clues, np.stack([_holds(clue, _worlds()) for clue in clues])


def _make(draws: NDArray[np.float64]) -> tuple[str, str, str]:
    count, numbers = len(_possible()[0]), iter(draws.tolist())
    at = int(next(numbers) * len(_worlds()))
    clues = _choose(at, next(numbers), np.array([next(numbers) for _ in range(count)]))
    people: list[str] = []
    for _ in range(_SIZE):
        people.append(pick([name for name in PEOPLE if name not in people], next(numbers)))
    slots = [(person, *slot) for person in range(_SIZE) for slot in ((True, False), (False, True), (True, True))]
    said = [_in_words(clues.get(slot), numbers) for slot in slots]
    question = _END.join(f"{person} {' '.join(said[3 * i : 3 * i + 3])}" for i, person in enumerate(people))
    has, where = _worlds()[at].reshape(2, _SIZE).tolist()
    kinds = list(_POSSESSIONS), list(_PLACES)
    answer = _END.join(
        f"{person} has the {kinds[0][a]} in the {kinds[1][b]}" for person, a, b in zip(people, has, where, strict=True)
    )
    content = f"{at} {sorted((c.person, sorted(c.has), sorted(c.where)) for c in clues.values())}"
    return content, f"{_QUESTION} {question}", f"{_ANSWER} {answer}"


def _choose(at: int, bluntness: float, draws: NDArray[np.float64]) -> dict[tuple[int, bool, bool], _Clue]:
    """Clues that together leave arrangement `at` alone, each of which ruled out another when it was added. The share of
    those that say a pair as it is grows with bluntness, in [0, 1)."""
    clues, holds = _possible()
    direct = np.array([clue.direct for clue in clues])
    order = np.argsort(draws - 0.8 * bluntness * direct)
    order = order[holds[order, at]]
    left, chosen = np.ones(holds.shape[1], dtype=bool), dict[tuple[int, bool, bool], _Clue]()
    for number in [*order, *order[direct[order]]]:  # the direct ones together always suffice
        clue, rest = clues[number], left & holds[number]
        if rest.sum() < left.sum() and (clue.slot not in chosen or clue.direct):
            left, chosen[clue.slot] = rest, clue
        if left.sum() == 1:
            break
    return chosen


def _in_words(clue: _Clue | None, numbers: Iterator[float]) -> str:
    draws = [next(numbers), next(numbers)]
    if clue is None:
        return _NOTHING
    named = [(kind, _POSSESSIONS) for kind in sorted(clue.has)] + [(kind, _PLACES) for kind in sorted(clue.where)]
    first = "is"
    if len(named) == _SIZE - 1:
        first, named = "not", [(kind, named[0][1]) for kind in _EVERY - (clue.has or clue.where)]
    said = [pick(list(kinds.values())[kind], u) for (kind, kinds), u in zip(named, draws, strict=False)]
    return " ".join(said) if len(said) == 2 else f"{first} {said[0]}"


def _clues(person: int, words: Sequence[str]) -> list[_Clue]:
    """Of the six words behind a name. Raises UserError for another text."""
    has, where, linked = (words[i : i + 2] for i in (0, 2, 4))
    clues = [_Clue(person, _said(has, _POSSESSIONS), _NONE), _Clue(person, _NONE, _said(where, _PLACES))]
    if " ".join(linked) != _NOTHING:
        kinds = _kind_of(linked[0], _POSSESSIONS), _kind_of(linked[1], _PLACES)
        if -1 in kinds:
            raise UserError(f"the link {' '.join(linked)!r} is none between a possession and a place")
        clues.append(_Clue(person, frozenset({kinds[0]}), frozenset({kinds[1]})))
    return clues


def _said(words: Sequence[str], kinds: Mapping[str, Sequence[str]]) -> frozenset[int]:
    """The kinds that a clue about them leaves."""
    if " ".join(words) == _NOTHING:
        return _EVERY
    named = [_kind_of(word, kinds) for word in (words[1:] if words[0] in ("is", "not") else words)]
    if -1 in named:
        raise UserError(f"the clue {' '.join(words)!r} is none about a {', a '.join(kinds)}")
    return _EVERY - set(named) if words[0] == "not" else frozenset(named)


def _kind_of(word: str, kinds: Mapping[str, Sequence[str]]) -> int:
    """The number of the kind that a word is of; -1 for none."""
    return next((number for number, words in enumerate(kinds.values()) if word in words), -1)


def _number(kind: str, kinds: Mapping[str, Sequence[str]]) -> int:
    return list(kinds).index(kind) if kind in kinds else -1
