"""Tasks by name. A task defines rows, prompt and grader."""

from __future__ import annotations

from rcd_core.errors import UserError
from rcd_core.tasks import official
from rcd_core.tasks.album import Album
from rcd_core.tasks.arithmetic import Arithmetic
from rcd_core.tasks.base import MASK_TEXT, SPLITS, Problem, Task
from rcd_core.tasks.boxed import Aime24, Aime25, BoxedTask, Math, Math500, MinervaMath
from rcd_core.tasks.chain import Chain
from rcd_core.tasks.grid import Grid
from rcd_core.tasks.gsm import Gsm1k, Gsm8k, GsmPlus, NumberTask
from rcd_core.tasks.humaneval import HumanEval, check_allowed
from rcd_core.tasks.qa import Qa
from rcd_core.tasks.stories import Stories
from rcd_core.tasks.sudoku import SUDOKU, SUDOKU9

GRADERS = ("default", "official")
_SYNTHETIC: tuple[Task, ...] = (SUDOKU, SUDOKU9, Arithmetic(), Stories(), Chain(), Grid(), Album())
_GRADE_SCHOOL: tuple[Task, ...] = (Gsm8k(), Gsm1k(), GsmPlus())
_BOXED: tuple[Task, ...] = (Math(), Math500(), MinervaMath(), Aime24(), Aime25())
TASKS: dict[str, Task] = {task.name: task for task in (*_SYNTHETIC, *_GRADE_SCHOOL, *_BOXED, HumanEval(), Qa())}


def get_task(name: str) -> Task:
    """The task called `name`. Raises UserError, which lists all names."""
    if name not in TASKS:
        raise UserError(f"data.task is {name!r}; allowed: {', '.join(TASKS)}")
    return TASKS[name]


def grade(task: str, completion: str, answer: str, prompt: str = "", grader: str = "default") -> bool:
    """Whether `completion` solves a problem of a task. answer: `Problem.answer`; prompt: the canvas of an infill task.

    grader: "official" judges tasks with a final number as GSM8K does and tasks with a box as MATH does (`official`);
    all other tasks have one grader. Raises UserError for an unknown task or grader, a missing canvas, and for humaneval
    unless RCD_RUN_CODE=1.
    """
    if grader not in GRADERS:
        raise UserError(f"grader is {grader!r}; allowed: {', '.join(GRADERS)}")
    chosen = get_task(task)
    if grader == "official" and isinstance(chosen, NumberTask):
        return official.gsm8k(completion, answer)
    if grader == "official" and isinstance(chosen, BoxedTask):
        return official.math(completion, answer)
    return chosen.grade(prompt, completion, answer)


def check(task: str, prompt: str, completion: str) -> bool | None:
    """Whether `completion` solves a prompt of a task, judged without the gold answer; None where it cannot be told."""
    judge = getattr(get_task(task), "check", None)
    try:
        return None if judge is None else judge(prompt, completion)
    except (UserError, ValueError):  # the prompt is no problem of this task; ValueError: a number of 4,300 digits
        return None


def layout(task: str, text: str) -> str:
    """A prompt, answer or completion of a task as people read it; unchanged for an unknown task."""
    show = getattr(TASKS.get(task), "layout", None)
    return str(show(text)) if show else text


def example_of_task(task: str) -> str | None:
    """A prompt of a task with a generator; None for the others."""
    chosen = get_task(task)
    try:
        return chosen.problem(chosen.synthetic(0, "test", 0)).prompt
    except UserError:
        return None


def has_official_grader(task: str) -> bool:
    """Whether a task has a second grader, `official`."""
    return isinstance(get_task(task), NumberTask | BoxedTask)


def check_gradable(task: str) -> None:
    """Raise UserError if completions of `task` cannot be graded in this environment. Call it before decoding."""
    if isinstance(get_task(task), HumanEval):
        check_allowed()


__all__ = [
    "GRADERS",
    "MASK_TEXT",
    "SPLITS",
    "TASKS",
    "Problem",
    "Task",
    "check",
    "check_gradable",
    "example_of_task",
    "get_task",
    "grade",
    "has_official_grader",
    "layout",
]
