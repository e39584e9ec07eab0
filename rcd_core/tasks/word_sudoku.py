"""6x6 Sudoku whose symbols are words: each row, column and box holds six words, one of each kind (a person, an animal,
a trade, an object, other things, a place). The prompt names them first.

A row looks like this ("." is unknown; cells row by row):

    {"question": "Mia otter baker drum plums attic: Mia . . . plums . . plums . . . baker . baker . . attic . . . drum .
                  . Mia . . . attic . . attic . . . Mia .",
     "answer": "Mia otter baker drum plums attic drum plums attic Mia otter baker otter baker Mia plums attic drum plums
                attic drum otter baker Mia baker Mia otter attic drum plums attic drum plums baker Mia otter"}

The vocabulary is a text's (over 1,000 tokens), while the answer's cells depend on each other as in Sudoku. Train and
test differ in the boards, whatever the words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError
from rcd_core.tasks.base import MASK_TEXT, Problem, draw_row
from rcd_core.tasks.sudoku import ANCHOR, SUDOKU
from rcd_core.tasks.words import ANIMALS, PEOPLE, PLACES, SINGLE_THINGS, THINGS, TRADES, pick

_KINDS = (PEOPLE, ANIMALS, TRADES, SINGLE_THINGS, THINGS, PLACES)
_UNKNOWN = "."


class WordSudoku:
    name = "word_sudoku"
    about = (
        f"Sudoku whose symbols are six words: it writes a word for each {MASK_TEXT}. A prompt is {ANCHOR}, the words "
        "and a colon, and then the 36 cells row by row."
    )
    infill = True
    fields: tuple[str, ...] = ("question", "answer")

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        def make(draws: NDArray[np.float64]) -> tuple[str, str, str]:
            words = [pick(kind, u) for kind, u in zip(_KINDS, draws.tolist(), strict=False)]
            board, puzzle = SUDOKU.draw(draws[len(_KINDS) :])
            question, answer = (
                " ".join(_UNKNOWN if cell == _UNKNOWN else words[int(cell) - 1] for cell in cells)
                for cells in (puzzle, board)
            )
            return board, f"{' '.join(words)}: {question}", answer

        return draw_row(self.name, index, split, seed, len(_KINDS) + SUDOKU.num_draws, make)

    def problem(self, row: Mapping[str, str]) -> Problem:
        words, colon, question = row["question"].partition(":")
        puzzle, board = question.split(), row["answer"].split()
        if not colon or not SUDOKU.is_valid(_digits(words.split(), board)):
            raise UserError(
                f"the answer is not a valid board of the six words before the question's colon: {row['answer'][:60]!r}"
            )
        if len(puzzle) != SUDOKU.cells or any(p not in (_UNKNOWN, b) for p, b in zip(puzzle, board, strict=True)):
            raise UserError(
                f"the question is not {SUDOKU.cells} cells, each '.' or the answer's word: {question[:60]!r}"
            )
        start = f"{ANCHOR} {' '.join(words.split())}:"
        cells = "".join(MASK_TEXT if cell == _UNKNOWN else f" {cell}" for cell in puzzle)
        answer = f"{start} {' '.join(board)}"
        return Problem(prompt=start + cells, response=answer, answer=answer)

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        words, puzzle = _parts(prompt)
        if len(words) != len(_KINDS) or len(puzzle) != SUDOKU.cells:
            raise UserError(f"prompt is {prompt[:60]!r}; grading {self.name} needs the canvas with the givens")
        of_answer, board = _parts(completion)
        kept = all(p in (_UNKNOWN, b) for p, b in zip(puzzle, board, strict=False))
        return of_answer == words and kept and SUDOKU.is_valid(_digits(words, board))

    def check(self, prompt: str, completion: str) -> bool:
        return self.grade(prompt, completion, "")

    def layout(self, text: str) -> str:
        """A canvas or an answer as a table for people; "." is unknown."""
        words, cells = _parts(text)
        if len(cells) != SUDOKU.cells:
            return text
        width = max(map(len, cells))
        rows = (cells[i : i + SUDOKU.size] for i in range(0, SUDOKU.cells, SUDOKU.size))
        table = [" ".join(cell.ljust(width) for cell in row).rstrip() for row in rows]
        return "\n".join([" ".join(words), "", *table])


def _parts(text: str) -> tuple[list[str], list[str]]:
    """(words, cells) of a canvas or of an answer."""
    words, _, cells = text.strip().removeprefix(ANCHOR).partition(":")
    return words.split(), cells.replace(MASK_TEXT, f" {_UNKNOWN} ").split()


def _digits(words: Sequence[str], cells: Sequence[str]) -> str:
    """The board in digits; "" with a cell that is none of the words."""
    digits = {word: str(i + 1) for i, word in enumerate(words)}
    return "".join(digits[cell] for cell in cells) if set(cells) <= set(digits) else ""
