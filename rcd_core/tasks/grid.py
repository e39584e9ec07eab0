"""Logic grids in words: three people, each with a thing, a food or an animal, in a room, a building or a landscape. The
question has a place for a clue about what each person has, where each person is, and where each possession is: "is"
says it, "not" excludes one, two words offer two, and "? ?" says nothing. Together the clues have one solution; the
answer names all pairs, by kind.

A row looks like this ("/" ends a line):

    {"question": "Grid: Selma is pig ? ? / Oscar ? ? not lobby / Felix salad frog study school / thing ? ? / food ? ? /
                  animal is pantry",
     "answer": "Pairs: Selma the animal the room / Oscar the thing the landscape / Felix the food the building /
                thing the landscape / food the building / animal the room"}

So Selma has an animal, which is in a room; Felix has a food or an animal, and is in a room or a building. Train and
test differ in solution and clues, whatever the words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations, permutations

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError
from rcd_core.tasks.base import Problem, draw_row
from rcd_core.tasks.words import ANIMALS, BUILDINGS, FOODS, LANDSCAPES, PEOPLE, ROOMS, SINGLE_THINGS, pick

_SIZE = 3
_POSSESSIONS = {"thing": SINGLE_THINGS, "food": FOODS, "animal": ANIMALS}
_PLACES = {"room": ROOMS, "building": BUILDINGS, "landscape": LANDSCAPES}
_QUESTION, _ANSWER, _END, _NOTHING = "Grid:", "Pairs:", " / ", "? ?"
_KINDS = [_POSSESSIONS, _PLACES] * _SIZE + [_PLACES] * _SIZE  # of each clue: of the people's, then of the possessions'
_NUM_CLUES = len(_KINDS)
Allowed = frozenset[int]  # numbers of kinds


class Grid:
    name = "grid"
    about = (
        "logic grids: three people, each with a thing, a food or an animal in a room, a building or a landscape. A "
        f"prompt is {_QUESTION} and a line for each person and possession, with / between them. Each line has clues of "
        f"two words: is and a word, not and a word, two words, or {_NOTHING}; the answer has the kinds."
    )
    infill = False
    fields: tuple[str, ...] = ("question", "answer")

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        return draw_row(self.name, index, split, seed, 2 + len(_possible()) + _SIZE + 3 * _NUM_CLUES, _make)

    def problem(self, row: Mapping[str, str]) -> Problem:
        question, answer = row["question"].strip(), row["answer"].strip()
        if not self.check(question, answer):
            raise UserError(
                f"the answer has not the {_NUM_CLUES} pairs that the question's clues leave: {answer[:80]!r}"
            )
        return Problem(prompt=question, response=answer, answer=answer)

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        return completion.split() == answer.split()

    def check(self, prompt: str, completion: str) -> bool:
        """Raises UserError for a prompt that is no problem of this task."""
        lines = _lines(prompt, _QUESTION)
        if lines is None:
            raise UserError(f"the prompt is no problem of {self.name}: {prompt[:80]!r}")
        words = [word for line in lines for word in line[1:]]
        clues = zip(words[::2], words[1::2], _KINDS, strict=True)
        allowed = [_allowed(first, second, kinds) for first, second, kinds in clues]
        found = _lines(completion, _ANSWER)
        if found is None or [line[0] for line in found] != [line[0] for line in lines]:
            return False
        words = [word for line in found for word in line[1:]]
        if set(words[::2]) != {"the"}:
            return False
        world = [
            list(kinds).index(word) if word in kinds else -1 for word, kinds in zip(words[1::2], _KINDS, strict=True)
        ]
        return world in _worlds().tolist() and all(n in a for n, a in zip(world, allowed, strict=True))

    def layout(self, text: str) -> str:
        """A question or an answer as lines for people."""
        return text.replace(_END, "\n")


def _lines(text: str, begin: str) -> list[list[str]] | None:
    """The words of each line, the first of which is the person or the kind of possession; None for another form."""
    first, *words = text.split() or [""]
    lines = [line.split() for line in " ".join(words).split(_END)]
    fits = first == begin and [len(line) for line in lines] == [5] * _SIZE + [3] * _SIZE
    return lines if fits and [line[0] for line in lines[_SIZE:]] == list(_POSSESSIONS) else None


@cache
def _worlds() -> NDArray[np.int64]:
    """(36, 9): for each arrangement the kind that each clue is about."""
    orders, people = list(permutations(range(_SIZE))), range(_SIZE)
    return np.array(
        [
            [kind for i in people for kind in (has[i], where[i])] + [where[has.index(kind)] for kind in range(_SIZE)]
            for has in orders
            for where in orders
        ]
    )


@cache
def _possible() -> list[tuple[int, Allowed]]:
    """Every clue: its number, and the one or two kinds that it leaves."""
    sets = [frozenset(kinds) for count in (1, 2) for kinds in combinations(range(_SIZE), count)]
    return [(clue, allowed) for clue in range(_NUM_CLUES) for allowed in sets]


def _make(draws: NDArray[np.float64]) -> tuple[str, str, str]:
    numbers = iter(draws.tolist())
    world = _worlds()[int(next(numbers) * len(_worlds()))].tolist()
    clues = _choose(world, next(numbers), [next(numbers) for _ in _possible()])
    people = [pick(PEOPLE, next(numbers)) for _ in range(_SIZE)]
    given = [_in_words(clues.get(clue), clue, numbers) for clue in range(_NUM_CLUES)]
    pairs = [f"the {list(kinds)[n]}" for n, kinds in zip(world, _KINDS, strict=True)]
    content = f"{world} {sorted((clue, sorted(allowed)) for clue, allowed in clues.items())}"
    return content, f"{_QUESTION} {_text(people, given)}", f"{_ANSWER} {_text(people, pairs)}"


def _choose(world: Sequence[int], bluntness: float, draws: Sequence[float]) -> dict[int, Allowed]:
    """Clues that together leave this world alone, each of which ruled out another when it was added. The share of those
    that say a pair as it is grows with bluntness, in [0, 1)."""
    left, chosen = _worlds(), dict[int, Allowed]()
    true = [(clue, allowed) for clue, allowed in _possible() if world[clue] in allowed]
    order = {c: u + (0.3 - 0.9 * bluntness) * (len(c[1]) == 1) for c, u in zip(_possible(), draws, strict=True)}
    direct = [c for c in true if len(c[1]) == 1]  # these together always suffice
    for clue, allowed in [*sorted(true, key=order.__getitem__), *direct]:
        rest = left[np.isin(left[:, clue], list(allowed))]
        if len(rest) < len(left) and (clue not in chosen or len(allowed) == 1):
            left, chosen[clue] = rest, allowed
        if len(left) == 1:
            break
    return chosen


def _in_words(allowed: Allowed | None, clue: int, numbers: Iterator[float]) -> str:
    kinds, words, excludes = _KINDS[clue], [next(numbers), next(numbers)], next(numbers) < 0.5
    if allowed is None:
        return _NOTHING
    named = sorted(set(range(_SIZE)) - allowed if len(allowed) == 2 and excludes else allowed)
    said = [pick(list(kinds.values())[kind], u) for kind, u in zip(named, words, strict=False)]
    return " ".join(said) if len(said) == 2 else f"{'is' if len(allowed) == 1 else 'not'} {said[0]}"


def _allowed(first: str, second: str, kinds: Mapping[str, Sequence[str]]) -> Allowed:
    """The kinds that a clue of two words leaves. Raises UserError for another text."""
    every = frozenset(range(_SIZE))
    if f"{first} {second}" == _NOTHING:
        return every
    found = [
        next((number for number, words in enumerate(kinds.values()) if word in words), None)
        for word in ((second,) if first in ("is", "not") else (first, second))
    ]
    if None in found:
        raise UserError(f"the clue {first!r} {second!r} is none about a {', a '.join(kinds)}")
    named = frozenset(number for number in found if number is not None)
    return every - named if first == "not" else named


def _text(people: Sequence[str], said: Sequence[str]) -> str:
    lines = [f"{person} {said[2 * i]} {said[2 * i + 1]}" for i, person in enumerate(people)]
    return _END.join([*lines, *(f"{kind} {said[2 * _SIZE + k]}" for k, kind in enumerate(_POSSESSIONS))])
