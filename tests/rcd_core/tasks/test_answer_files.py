"""Graders against public answer files, if they are next to the repository, which contains no row of them.

Every gold answer must be right against itself and wrong against the next row with a different answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import pytest

from rcd_core.tasks import Problem, get_task, math_grader
from rcd_core.tasks.answers import final_number
from rcd_core.tasks.exact import exact_number
from rcd_core.tasks.math_text import normalise
from rcd_core.tasks.rows import check_columns, read_rows

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
FILES = {  # file: task, rows, stride of the short test
    "aime24": ("aime24", 30, 1),
    "aime25": ("aime25", 30, 1),
    "math500": ("math500", 500, 5),
    "minerva_math": ("minerva_math", 272, 5),
    "gsm8k_test": ("gsm8k", 1319, 1),
    "gsm8k_train": ("gsm8k", 7473, 5),
}
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data beside the repository")


def problems(file: str) -> list[Problem]:
    """All rows of a file; none may be bad."""
    name, num_rows, _ = FILES[file]
    task = get_task(name)
    columns = {field: field for field in task.fields}
    path = str(DATA / f"{file}.jsonl")
    check_columns(path, columns, "data.test")
    rows = list(read_rows(path, columns))
    assert len(rows) == num_rows
    return [task.problem(row.values or {}) for row in rows]


def value(answer: str) -> str:
    """Normal form: x = 5 and 5 are the same answer, as are 1,000 and 1000."""
    bare = re.sub(r"^\s*\w\s*=", "", answer).replace("$", "").replace(" ", "")
    number = exact_number(bare)
    return bare if number is None else str(number)


def with_the_next(rows: list[Problem]) -> Iterator[tuple[Problem, Problem]]:
    """Each problem with the next one (cyclic) that has a different answer."""
    for i, problem in enumerate(rows):
        yield problem, next(p for p in islice(cycle(rows), i + 1, None) if value(p.answer) != value(problem.answer))


def check(file: str, every: int) -> None:
    name, _, _ = FILES[file]
    task = get_task(name)
    pairs = list(with_the_next(problems(file)[::every]))
    assert [p.answer for p, _ in pairs if not task.grade(p.prompt, p.response, p.answer)] == []
    assert [(p.answer, q.answer) for p, q in pairs if task.grade(p.prompt, p.response, q.answer)] == []
    if final_number(pairs[0][0].answer) is None:
        # Without the shortcut for equal texts: math-verify must read every answer that is mathematics as a whole.
        texts = [normalise(p.answer) for p, _ in pairs]
        texts = [text for text in texts if math_grader._is_mathematics(text) and math_grader._parts(text) is None]
        assert [text for text in texts if not math_grader._GRADER.verify(text, text, 20)] == []


@pytest.mark.parametrize("all_rows", [False, pytest.param(True, marks=pytest.mark.drill)])
@pytest.mark.parametrize("file", FILES)
def test_gold_answers_are_right_and_the_next_ones_wrong(file: str, all_rows: bool) -> None:
    check(file, 1 if all_rows else FILES[file][2])
