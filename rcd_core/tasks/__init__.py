"""Tasks by name. Each module is one task: rows, prompt, grader."""

from __future__ import annotations

from rcd_core.errors import UserError
from rcd_core.tasks.arithmetic import Arithmetic
from rcd_core.tasks.base import MASK_TEXT, SPLITS, Problem, Task
from rcd_core.tasks.gsm8k import Gsm8k
from rcd_core.tasks.math import Math
from rcd_core.tasks.sudoku import Sudoku

TASKS: dict[str, Task] = {task.name: task for task in (Sudoku(), Arithmetic(), Gsm8k(), Math())}


def get_task(name: str) -> Task:
    """The task called `name`; UserError listing the names."""
    if name not in TASKS:
        raise UserError(f"data.task is {name!r}; allowed: {', '.join(TASKS)}")
    return TASKS[name]


__all__ = ["MASK_TEXT", "SPLITS", "TASKS", "Problem", "Task", "get_task"]
