"""6x6 Sudoku as infilling: boxes of 2 rows x 3 columns, digits 1-6, 8-16 givens standing in place.

A row looks like this one ("." is unknown; cells row by row):

    {"question": "1...5..5...3.3..6...4..1...6..6...1.", "answer": "123456456123231564564231312645645312"}

A puzzle has often more than one solution: any valid board that keeps the givens is right. The canvas starts with an
anchor "#": rotary positions are relative, and one clean token in a fixed place tells the model which cell is which.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rcd_core.errors import UserError
from rcd_core.noise import hash_key, uniforms
from rcd_core.tasks.base import MASK_TEXT, Problem, belongs_to

SIZE, BOX_ROWS, BOX_COLUMNS = 6, 2, 3
CELLS = SIZE * SIZE
MIN_GIVENS, MAX_GIVENS = 8, 16
ANCHOR = "#"
DIGITS = "123456"

_ROW = [cell // SIZE for cell in range(CELLS)]
_COLUMN = [cell % SIZE for cell in range(CELLS)]
_BOX = [r // BOX_ROWS * BOX_ROWS + c // BOX_COLUMNS for r, c in zip(_ROW, _COLUMN, strict=True)]
_UNITS = [[cell for cell in range(CELLS) if of[cell] == unit] for of in (_ROW, _COLUMN, _BOX) for unit in range(SIZE)]


class Sudoku:
    name = "sudoku"
    infill = True
    fields: tuple[str, ...] = ("question", "answer")

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        for attempt in range(64):
            draws = uniforms(hash_key("sudoku", seed, split, index, attempt), CELLS * SIZE + CELLS + 1)
            board = _fill(draws[: CELLS * SIZE])
            if belongs_to(split, board):
                return {"question": _hide(board, draws[CELLS * SIZE :]), "answer": board}
        raise RuntimeError(f"no {split} board in 64 draws: index {index}, seed {seed}")  # a chance of 2**-64

    def problem(self, row: Mapping[str, str]) -> Problem:
        puzzle, board = row["question"].strip().replace("0", "."), row["answer"].strip()
        if not is_valid(board):
            raise UserError(f"the answer is not a valid 6x6 board of {CELLS} digits 1-6: {board[:40]!r}")
        if len(puzzle) != CELLS or any(p not in (".", b) for p, b in zip(puzzle, board, strict=True)):
            raise UserError(f"the question is not {CELLS} cells, each '.' or the answer's digit: {puzzle[:40]!r}")
        canvas = ANCHOR + puzzle.replace(".", MASK_TEXT)
        return Problem(prompt=canvas, response=ANCHOR + board, answer=ANCHOR + board)

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        puzzle = prompt.strip().replace(MASK_TEXT, ".").removeprefix(ANCHOR)
        if len(puzzle) != CELLS:
            raise UserError(f"prompt is {prompt[:40]!r}; grading sudoku needs the canvas: which cells were given")
        board = completion.strip().removeprefix(ANCHOR)
        return is_valid(board) and all(p in (".", b) for p, b in zip(puzzle, board, strict=True))


def is_valid(board: str) -> bool:
    """Whether `board` is 36 digits 1-6, none twice in a row, column or box."""
    if len(board) != CELLS or not set(board) <= set(DIGITS):
        return False
    return all(len({board[cell] for cell in unit}) == SIZE for unit in _UNITS)


def _fill(draws: NDArray[np.float64]) -> str:
    """A board by backtracking, trying each cell's digits in a drawn order; draws: (CELLS * SIZE,) in [0, 1)."""
    order = draws.reshape(CELLS, SIZE).argsort(axis=1).tolist()
    rows, columns, boxes = [0] * SIZE, [0] * SIZE, [0] * SIZE  # digits used, one bit each
    tried = [0] * CELLS
    digit = [0] * CELLS
    cell = 0
    while cell < CELLS:
        r, c, b = _ROW[cell], _COLUMN[cell], _BOX[cell]
        used = rows[r] | columns[c] | boxes[b]
        for position in range(tried[cell], SIZE):
            bit = 1 << order[cell][position]
            if not used & bit:
                rows[r] |= bit
                columns[c] |= bit
                boxes[b] |= bit
                digit[cell] = bit
                tried[cell] = position + 1
                cell += 1
                break
        else:  # no digit fits: forget this cell's tries and take back the cell before
            tried[cell] = 0
            cell -= 1
            r, c, b = _ROW[cell], _COLUMN[cell], _BOX[cell]
            rows[r] ^= digit[cell]
            columns[c] ^= digit[cell]
            boxes[b] ^= digit[cell]
    return "".join(str(bit.bit_length()) for bit in digit)


def _hide(board: str, draws: NDArray[np.float64]) -> str:
    """Keep MIN_GIVENS..MAX_GIVENS cells; draws: (CELLS + 1,) in [0, 1)."""
    num_givens = MIN_GIVENS + int(draws[0] * (MAX_GIVENS - MIN_GIVENS + 1))
    givens = set(draws[1:].argsort()[:num_givens].tolist())
    return "".join(digit if cell in givens else "." for cell, digit in enumerate(board))
