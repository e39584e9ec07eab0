"""Picture albums in words: six pages of six pictures, each of a person, an animal, a trade, a thing, a food or a place.
Every page has a picture of each kind, and so has every column, and every half of two facing pages. The question names
some pictures, the answer the kind of all: 6x6 Sudoku in a text.

A row looks like this ("?" is unknown, "/" ends a page):

    {"question": "Album: ? ? ? bucket ? ? / ? ? lake ? ? Cora / bat lawyer blanket curry ? ? / ? ? onion detective ? ? /
                  spear ? ? Ada ? electrician / Olga coffee ? school ? ?",
     "answer": "Kinds: trade animal person thing place food / food thing place animal trade person / animal trade thing
                food person place / place person food trade thing animal / thing place animal person food trade /
                person food trade place animal thing"}

The vocabulary is a text's (over 1,000 tokens), while the places of an answer depend on each other. Any answer that fits
the named pictures is right. Train and test differ in the order of the kinds, whatever the words.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError
from rcd_core.tasks.base import Problem, draw_row
from rcd_core.tasks.sudoku import SUDOKU
from rcd_core.tasks.words import ANIMALS, FOODS, PEOPLE, PLACES, SINGLE_THINGS, TRADES, pick

_KINDS = {
    "person": PEOPLE,
    "animal": ANIMALS,
    "trade": TRADES,
    "thing": SINGLE_THINGS,
    "food": FOODS,
    "place": PLACES,
}
_NAMES = tuple(_KINDS)
_DIGIT_OF = {kind: str(i + 1) for i, kind in enumerate(_NAMES)}  # of a board of Sudoku
_KIND_OF = {word: kind for kind, items in _KINDS.items() for word in items}
_UNKNOWN = "?"
_QUESTION, _ANSWER = "Album:", "Kinds:"


class Album:
    name = "album"
    about = (
        "picture albums: six pages of six pictures. Each page, column and half of two facing pages has a person, an "
        f"animal, a trade, a thing, a food and a place. A prompt is {_QUESTION} and a picture or {_UNKNOWN} for each, "
        "with / between pages; the answer has their kinds."
    )
    infill = False
    fields: tuple[str, ...] = ("question", "answer")

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        def make(draws: NDArray[np.float64]) -> tuple[str, str, str]:
            board, puzzle = SUDOKU.draw(draws[SUDOKU.cells :])
            kinds = [_NAMES[int(digit) - 1] for digit in board]
            named = [pick(_KINDS[kind], u) for kind, u in zip(kinds, draws.tolist(), strict=False)]
            shown = [word if digit in SUDOKU.digits else _UNKNOWN for word, digit in zip(named, puzzle, strict=True)]
            return board, f"{_QUESTION} {_text(shown)}", f"{_ANSWER} {_text(kinds)}"

        return draw_row(self.name, index, split, seed, SUDOKU.cells + SUDOKU.num_draws, make)

    def problem(self, row: Mapping[str, str]) -> Problem:
        question, answer = row["question"].strip(), row["answer"].strip()
        if not self.grade(question, answer, ""):
            raise UserError(f"the answer is no album of six kinds that has the question's pictures: {answer[:60]!r}")
        return Problem(prompt=question, response=answer, answer=answer)

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        given = [word if word == _UNKNOWN else _KIND_OF.get(word, "") for word in _pictures(prompt)]
        if len(given) != SUDOKU.cells or "" in given:
            raise UserError(f"the prompt is no problem of {self.name}: {prompt[:80]!r}")
        kinds = _pictures(completion)
        board = "".join(_DIGIT_OF.get(kind, "?") for kind in kinds)
        return SUDOKU.is_valid(board) and all(g in (_UNKNOWN, k) for g, k in zip(given, kinds, strict=True))

    def check(self, prompt: str, completion: str) -> bool:
        return self.grade(prompt, completion, "")

    def layout(self, text: str) -> str:
        """A question or an answer as a table for people."""
        pictures = _pictures(text)
        if len(pictures) != SUDOKU.cells:
            return text
        width = max(map(len, pictures))
        rows = (pictures[i : i + SUDOKU.size] for i in range(0, SUDOKU.cells, SUDOKU.size))
        return "\n".join(" ".join(picture.ljust(width) for picture in row).rstrip() for row in rows)


def _text(pictures: list[str]) -> str:
    rows = (pictures[i : i + SUDOKU.size] for i in range(0, SUDOKU.cells, SUDOKU.size))
    return " / ".join(" ".join(row) for row in rows)


def _pictures(text: str) -> list[str]:
    return [word for word in text.split() if word not in (_QUESTION, _ANSWER, "/")]
