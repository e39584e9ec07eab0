"""Sudoku as infilling: the givens are fixed, the other cells are masked. 6x6 (boxes of 2 rows x 3 columns, 8-16
givens) and 9x9 (boxes of 3 x 3, 32-48 givens).

A row of the 6x6 task and one of the 9x9 task look like this ("." is unknown; cells row by row):

    {"question": "1...5..5...3.3..6...4..1...6..6...1.", "answer": "123456456123231564564231312645645312"}
    {"question": "..73.9.1.2941576..183462.97..1.3....34629.17.8...1.9.4.6...382151267..494.8.2...5",
     "answer": "657389412294157683183462597971834256346295178825716934769543821512678349438921765"}

A puzzle often has more than one solution: any valid board that keeps the givens is right. The canvas starts with an
anchor "#": rotary positions are relative, and a clean token at a fixed place lets the model identify the cells.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError
from rcd_core.tasks.base import MASK_TEXT, Problem, draw_row

ANCHOR = "#"


class Sudoku:
    """Boards of size x size cells in boxes of box_rows x (size / box_rows), with givens[0] to givens[1] cells known."""

    infill = True
    fields: tuple[str, ...] = ("question", "answer")

    def __init__(self, name: str, size: int, box_rows: int, givens: tuple[int, int]) -> None:
        self.name, self.size, self.num_givens = name, size, givens
        self.cells = size * size
        self.digits = "123456789"[:size]
        self.box_rows, self.box_columns = box_rows, (box_columns := size // box_rows)
        self.about = (
            f"Sudoku of {size} x {size} cells: it writes a digit for each {MASK_TEXT}. A prompt is {ANCHOR}, which "
            "marks the start of the board, and then the cells row by row."
        )
        cells = ((cell // size, cell % size) for cell in range(self.cells))
        # Units are rows, columns and boxes; every cell is in three of them.
        self._units_of = [(r, size + c, 2 * size + r // box_rows * box_rows + c // box_columns) for r, c in cells]
        self._units = [[c for c, units in enumerate(self._units_of) if unit in units] for unit in range(3 * size)]

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        def make(draws: NDArray[np.float64]) -> tuple[str, str, str]:
            board, puzzle = self.draw(draws)
            return board, puzzle, board

        return draw_row(self.name, index, split, seed, self.num_draws, make)

    @property
    def num_draws(self) -> int:
        return self.cells * self.size + self.cells + 1

    def draw(self, draws: NDArray[np.float64]) -> tuple[str, str]:
        """(board, puzzle) from (num_draws,) uniform numbers in [0, 1)."""
        num_order = self.cells * self.size
        board = self._fill(draws[:num_order])
        return board, self._hide(board, draws[num_order:])

    def problem(self, row: Mapping[str, str]) -> Problem:
        puzzle, board = row["question"].strip().replace("0", "."), row["answer"].strip()
        if not self.is_valid(board):
            raise UserError(
                f"the answer is not a valid {self.size}x{self.size} board of {self.cells} digits "
                f"1-{self.size}: {board[:40]!r}"
            )
        if len(puzzle) != self.cells or any(p not in (".", b) for p, b in zip(puzzle, board, strict=True)):
            raise UserError(f"the question is not {self.cells} cells, each '.' or the answer's digit: {puzzle[:40]!r}")
        canvas = ANCHOR + puzzle.replace(".", MASK_TEXT)
        return Problem(prompt=canvas, response=ANCHOR + board, answer=ANCHOR + board)

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        puzzle = prompt.strip().replace(MASK_TEXT, ".").removeprefix(ANCHOR)
        if len(puzzle) != self.cells:
            raise UserError(f"prompt is {prompt[:40]!r}; grading {self.name} needs the canvas with the givens")
        board = completion.strip().removeprefix(ANCHOR)
        return self.is_valid(board) and all(p in (".", b) for p, b in zip(puzzle, board, strict=True))

    def check(self, prompt: str, completion: str) -> bool:
        return self.grade(prompt, completion, "")

    def layout(self, text: str) -> str:
        """A canvas or a board as a grid for people, with space between the boxes; "." is unknown."""
        cells = text.strip().replace(MASK_TEXT, ".").removeprefix(ANCHOR)
        if len(cells) != self.cells:
            return text
        lines = []
        for row in range(self.size):
            parts = cells[row * self.size : (row + 1) * self.size]
            boxes = (parts[i : i + self.box_columns] for i in range(0, self.size, self.box_columns))
            lines += [""] if row and row % self.box_rows == 0 else []
            lines.append("  ".join(" ".join(box) for box in boxes))
        return "\n".join(lines)

    def is_valid(self, board: str) -> bool:
        """Whether `board` has a digit in every cell and none twice in a row, column or box."""
        if len(board) != self.cells or not set(board) <= set(self.digits):
            return False
        return all(len({board[cell] for cell in unit}) == self.size for unit in self._units)

    def _fill(self, draws: NDArray[np.float64]) -> str:
        """A board by backtracking that tries each cell's digits in random order. draws: (cells * size,) in [0, 1)."""
        order = draws.reshape(self.cells, self.size).argsort(axis=1).tolist()
        used = [0] * (3 * self.size)  # digits of each unit, one bit each
        tried, digit = [0] * self.cells, [0] * self.cells
        cell = 0
        while cell < self.cells:
            a, b, c = self._units_of[cell]
            taken = used[a] | used[b] | used[c]
            for position in range(tried[cell], self.size):
                bit = 1 << order[cell][position]
                if not taken & bit:
                    digit[cell], tried[cell] = bit, position + 1
                    for unit in (a, b, c):
                        used[unit] |= bit
                    cell += 1
                    break
            else:  # no digit fits: go back to the previous cell
                tried[cell] = 0
                cell -= 1
                for unit in self._units_of[cell]:
                    used[unit] ^= digit[cell]
        return "".join(str(bit.bit_length()) for bit in digit)

    def _hide(self, board: str, draws: NDArray[np.float64]) -> str:
        """Hide all but a random number of random cells. draws: (cells + 1,) in [0, 1)."""
        fewest, most = self.num_givens
        givens = set(draws[1:].argsort()[: fewest + int(draws[0] * (most - fewest + 1))].tolist())
        return "".join(digit if cell in givens else "." for cell, digit in enumerate(board))


SUDOKU = Sudoku("sudoku", size=6, box_rows=2, givens=(8, 16))
SUDOKU9 = Sudoku("sudoku9", size=9, box_rows=3, givens=(32, 48))
