"""Small tasks that test the measure of `rcd predict`: their bases were measured before any result of a method there was
known. Each is a canvas of 37 tokens, like 6x6 Sudoku; they differ in what a discarded prediction is worth.

- latin: Sudoku without boxes. As in Sudoku, a discarded prediction is a list of candidates.
- shuffles: six rows, each with the digits 1 to 6 in any order. What is discarded is a toss among the digits that the
  row does not have yet, and these can be read off the row.
- walk: 18 steps round a ring of six places, "#" and then for each step its length and the place where it ends. A place
  is certain as soon as the one before it is known, and hardly known before.

And two that were chosen when every candidate had failed on one of these or on the text task `chain`:

- unique: 6x6 Sudoku with as many givens as leave one solution, so that nothing is a matter of choice.
- colours: a map of 6 x 6 cells in three colours, of which neighbours have different ones. Many colourings are right.

And four that were chosen after those. Two are meant to leave choices and let others be inferred, one has ranges, and
one could mislead a measure that sums over a whole board:

- dominoes: a board of 6 x 6 cells tiled with dominoes; each cell says where its other half is.
- binary: a board of ones and twos, three of each in every row and column, nowhere three of a kind next to each other.
- sorted: digits 1 to 6 that fall in no row and no column. A discarded prediction is a range.
- halves: three rows of `shuffles` and nine steps of `walk`. One half leaves choices and the other lets be inferred.

sudoku9_easy is 9x9 Sudoku, of 82 tokens, with 46 to 56 givens: a base of 1,600 steps did not learn the product's task,
with 32 to 48.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rcd_core.tasks import Task, get_task
from rcd_core.tasks.base import MASK_TEXT, Problem, draw_row
from rcd_core.tasks.sudoku import ANCHOR, Sudoku


class Shuffles(Sudoku):
    """Boards on which only rows count."""

    def __init__(self, name: str) -> None:
        super().__init__(name, size=6, box_rows=1, givens=(8, 16))
        self._units_of = [(row := cell // self.size, row, row) for cell in range(self.cells)]
        self._units = [[c for c in range(self.cells) if c // self.size == row] for row in range(self.size)]


class Unique(Sudoku):
    """Boards with the first givens of a random order that leave one solution, and at least givens[0] of them."""

    def __init__(self, name: str) -> None:
        super().__init__(name, size=6, box_rows=2, givens=(12, 12))

    def _hide(self, board: str, draws: NDArray[np.float64]) -> str:
        order = draws[1:].argsort().tolist()

        def puzzle(count: int) -> str:
            known = set(order[:count])
            return "".join(digit if cell in known else "." for cell, digit in enumerate(board))

        least = range(self.num_givens[0], self.cells + 1)  # more givens never leave more solutions
        return puzzle(least[bisect_left(least, 1, key=lambda count: 2 - self._solutions(puzzle(count)))])

    def _solutions(self, puzzle: str, most: int = 2) -> int:
        """The number of solutions, at most `most`. Fills in the cell with the fewest digits that fit first."""
        fitting = {
            cell: set(self.digits) - {puzzle[other] for unit in self._units_of[cell] for other in self._units[unit]}
            for cell, digit in enumerate(puzzle)
            if digit == "."
        }
        if not fitting:
            return 1
        cell, found = min(fitting, key=lambda cell: len(fitting[cell])), 0
        for digit in fitting[cell]:
            found += self._solutions(puzzle[:cell] + digit + puzzle[cell + 1 :], most - found)
            if found >= most:
                break
        return found


class Colours(Sudoku):
    """Boards of the digits 1 to 3, on which cells that share an edge differ."""

    def __init__(self, name: str) -> None:
        super().__init__(name, size=6, box_rows=1, givens=(8, 16))
        self.digits = "123"

    def is_valid(self, board: str) -> bool:
        rows = [board[i : i + self.size] for i in range(0, self.cells, self.size)]
        lines = [*rows, *("".join(column) for column in zip(*rows, strict=False))]
        if len(board) != self.cells or not set(board) <= set(self.digits):
            return False
        return all(one != other for line in lines for one, other in pairwise(line))

    def _fill(self, draws: NDArray[np.float64]) -> str:
        board = ""
        for cell in range(self.cells):
            above = board[cell - self.size] if cell >= self.size else ""
            fitting = [d for d in self.digits if d not in (above, board[-1] if cell % self.size else "")]
            board += fitting[int(draws[cell] * len(fitting))]
        return board


class Dominoes(Sudoku):
    """Boards of the digits 1 to 4: the other half of the cell's domino is to its right, left, below or above."""

    def __init__(self, name: str) -> None:
        super().__init__(name, size=6, box_rows=1, givens=(8, 16))
        self.digits = "1234"

    def is_valid(self, board: str) -> bool:
        if len(board) != self.cells or not set(board) <= set(self.digits):
            return False
        return all(self._is_matched(board, cell) for cell in range(self.cells))

    def _is_matched(self, board: str, cell: int) -> bool:
        row, column = divmod(cell, self.size)
        down, right, other = {"1": (0, 1, "2"), "2": (0, -1, "1"), "3": (1, 0, "4"), "4": (-1, 0, "3")}[board[cell]]
        inside = 0 <= row + down < self.size and 0 <= column + right < self.size
        return inside and board[cell + down * self.size + right] == other

    def _fill(self, draws: NDArray[np.float64]) -> str:
        board = [""] * self.cells

        def fill(cell: int) -> bool:  # the cells before it are covered
            while cell < self.cells and board[cell]:
                cell += 1
            if cell == self.cells:
                return True
            ways = {
                "12": cell + 1 if (cell + 1) % self.size and not board[cell + 1] else None,
                "34": cell + self.size if cell + self.size < self.cells else None,
            }
            for way in ("12", "34") if draws[cell] < 0.5 else ("34", "12"):
                if (other := ways[way]) is not None:
                    board[cell], board[other] = way
                    if fill(cell + 1):
                        return True
                    board[cell] = board[other] = ""
            return False

        fill(0)
        return "".join(board)


class Binary(Sudoku):
    """Boards of ones and twos: as many of each in every row and column, and no three of a kind in a line."""

    def __init__(self, name: str) -> None:
        super().__init__(name, size=6, box_rows=1, givens=(8, 16))
        self.digits = "12"

    def is_valid(self, board: str) -> bool:
        return len(board) == self.cells and set(board) <= set(self.digits) and self._is_open(board)

    def _is_open(self, board: str) -> bool:
        """Whether no rule is broken by the first cells of a board, row by row."""
        rows = [board[i : i + self.size] for i in range(0, len(board), self.size)]
        lines = [*rows, *(board[column :: self.size] for column in range(self.size))]
        return not any(line.count(d) > self.size // 2 or 3 * d in line for line in lines for d in self.digits)

    def _fill(self, draws: NDArray[np.float64]) -> str:
        def fill(board: str) -> str:
            if len(board) == self.cells:
                return board
            for digit in "12" if draws[len(board)] < 0.5 else "21":
                if self._is_open(board + digit) and (found := fill(board + digit)):
                    return found
            return ""

        return fill("")


class Sorted(Sudoku):
    """Boards whose digits fall in no row and no column."""

    def __init__(self, name: str) -> None:
        super().__init__(name, size=6, box_rows=1, givens=(8, 16))

    def is_valid(self, board: str) -> bool:
        rows = [board[i : i + self.size] for i in range(0, self.cells, self.size)]
        lines = [*rows, *("".join(column) for column in zip(*rows, strict=False))]
        return (
            len(board) == self.cells
            and set(board) <= set(self.digits)
            and all("".join(sorted(line)) == line for line in lines)
        )

    def _fill(self, draws: NDArray[np.float64]) -> str:
        numbers = draws[: self.cells].reshape(self.size, self.size)  # columns sorted after rows leave rows sorted
        numbers = np.sort(np.sort(numbers, axis=1), axis=0)
        return "".join(self.digits[int(number * self.size)] for number in numbers.ravel())


class Walk:
    """A row: {"question": "3.5.1. ...", "answer": "335253..."}, the places counted from 0 and the start at 0."""

    name = "walk"
    infill = True
    fields: tuple[str, ...] = ("question", "answer")
    steps, places = 18, 6

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        def make(draws: NDArray[np.float64]) -> tuple[str, str, str]:
            lengths = (draws * self.places).astype(int)
            ends = lengths.cumsum() % self.places
            answer = "".join(f"{length}{end}" for length, end in zip(lengths, ends, strict=True))
            return answer, re.sub(r"(.).", r"\1.", answer), answer

        return draw_row(self.name, index, split, seed, self.steps, make)

    def problem(self, row: Mapping[str, str]) -> Problem:
        canvas = ANCHOR + row["question"].replace(".", MASK_TEXT)
        return Problem(prompt=canvas, response=ANCHOR + row["answer"], answer=ANCHOR + row["answer"])

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        return completion.strip() == answer


class Halves(Sudoku):
    """Boards with three rows of the digits 1 to 6 in any order, 4 to 8 of them known, and nine steps of `walk`."""

    def __init__(self, name: str) -> None:
        super().__init__(name, size=6, box_rows=1, givens=(4, 8))
        self.digits = "0123456"
        self.half = self.cells // 2

    def is_valid(self, board: str) -> bool:
        rows = [board[i : i + self.size] for i in range(0, self.half, self.size)]
        if len(board) != self.cells or any(set(row) != set("123456") for row in rows):
            return False
        steps = [int(digit) for digit in board[self.half :]]
        ends = [0, *steps[1::2]]
        return all((start + length) % 6 == end for start, length, end in zip(ends, steps[::2], ends[1:], strict=False))

    def _fill(self, draws: NDArray[np.float64]) -> str:
        rows = draws[: self.half].reshape(-1, self.size).argsort(axis=1).ravel() + 1
        lengths = (draws[self.half : self.half + self.half // 2] * 6).astype(int)
        steps = zip(lengths.tolist(), (lengths.cumsum() % 6).tolist(), strict=True)
        return "".join(map(str, rows.tolist())) + "".join(f"{length}{end}" for length, end in steps)

    def _hide(self, board: str, draws: NDArray[np.float64]) -> str:
        fewest, most = self.num_givens
        givens = set(draws[1 : 1 + self.half].argsort()[: fewest + int(draws[0] * (most - fewest + 1))].tolist())
        givens |= set(range(self.half, self.cells, 2))
        return "".join(digit if cell in givens else "." for cell, digit in enumerate(board))


_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Sudoku("latin", size=6, box_rows=1, givens=(8, 16)),
        Shuffles("shuffles"),
        Walk(),
        Unique("unique"),
        Colours("colours"),
        Dominoes("dominoes"),
        Sudoku("sudoku9_easy", size=9, box_rows=3, givens=(46, 56)),
        Binary("binary"),
        Sorted("sorted"),
        Halves("halves"),
    )
}


def find_task(name: str) -> Task:
    """One of these, or one of the product's. Raises UserError for an unknown name."""
    return _TASKS[name] if name in _TASKS else get_task(name)
