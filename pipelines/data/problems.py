"""The test problems of a recipe as text, for models behind an HTTP endpoint. Needs no tokenizer and no cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from pipelines.data.sources import check_sources, row_limit, rows_of, source_files
from pipelines.recipe.sources import SYNTHETIC
from pipelines.run.directory import StageContext
from rcd_core.errors import UserError
from rcd_core.tasks import Problem, Task, get_task
from rcd_core.tasks.files import BadRow
from rcd_core.tasks.rows import Row
from rcd_core.text.encoding import content_id, example_of


@dataclass(frozen=True, kw_only=True)
class TestProblem:
    """One problem. example_id: the same as in stage prepare."""

    example_id: str
    prompt: str
    answer: str


def read_problems(ctx: StageContext) -> list[TestProblem]:
    """The problems in the order of their ids. Raises UserError when more rows are bad than data.max_bad_rows allows."""
    recipe, data = ctx.recipe, ctx.recipe.data
    check_sources(recipe)
    task = get_task(data.task_of("test"))
    problems, reasons, copies = [], Counter[str](), Counter[str]()
    for source, row in _rows(ctx):
        try:
            problem = _problem(row, task)
        except (BadRow, UserError) as bad:
            reasons[str(bad.args[0])] += 1
            continue
        example_id = f"{row.number:08d}" if source == SYNTHETIC else content_id(problem)
        number = copies[example_id]
        copies[example_id] += 1
        unique = f"{example_id}-{number}" if number else example_id
        problems.append(TestProblem(example_id=unique, prompt=problem.prompt, answer=problem.answer))
    num_bad = sum(reasons.values())
    if num_bad > data.max_bad_rows * (num_bad + len(problems)) or not problems:
        why = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        raise UserError(f"data.test: {num_bad} of {num_bad + len(problems)} rows cannot be used: {why or 'no rows'}")
    if num_bad:
        ctx.console.print(f"left out {num_bad} bad rows: {', '.join(reasons)}", soft_wrap=True, markup=False)
    return sorted(problems, key=lambda problem: problem.example_id)


def _problem(row: Row, task: Task) -> Problem:
    problem = example_of(row, task)
    if not isinstance(problem, Problem):
        raise BadRow("more than a question and an answer, which an endpoint is not sent")
    if row.conversation is not None:
        return task.problem({"question": problem.prompt, "answer": problem.response})
    return problem


def _rows(ctx: StageContext) -> Iterator[tuple[str, Row]]:
    recipe, limit = ctx.recipe, row_limit(ctx.recipe, "test")
    sources = source_files(recipe, "test")
    if sources:
        rows = (((source.label, row) for row in rows_of(recipe, "test", source.path)) for source in sources)
        yield from islice(chain.from_iterable(rows), limit)
        return
    task = get_task(recipe.data.task_of("test"))
    for i in range(limit or 0):  # rules.py requires a number for synthetic data
        yield SYNTHETIC, Row(i, values=task.synthetic(i, "test", recipe.seed))
