r"""What the tasks share whose answer stands in a \boxed{}: MATH, MATH-500, MinervaMath, AIME.

The prompt is the question and one sentence that asks for the box. The last box of a completion is compared with the
answer by math-verify (see `math_grader`), which the paper's evaluation uses through lighteval.
"""

from __future__ import annotations

from collections.abc import Mapping

from rcd_core.errors import UserError
from rcd_core.tasks.answers import last_box
from rcd_core.tasks.base import Problem, no_generator
from rcd_core.tasks.math_grader import same_math

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."


class BoxedTask:
    """A task with the fields question and answer, and maybe solution. hub: where its rows can be had, for messages."""

    name: str
    hub: str
    infill = False
    fields: tuple[str, ...] = ("question", "answer")

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        raise no_generator(self.name, split, self.hub)

    def problem(self, row: Mapping[str, str]) -> Problem:
        question, answer = row["question"].strip(), self.answer(row)
        if not answer:
            raise UserError("the answer is empty")
        response = row["solution"].strip() if "solution" in self.fields else ""
        if last_box(response) is None:  # otherwise the model would never learn to give one
            response = f"{response}\n\\boxed{{{answer}}}".strip()
        prompt = question if question.endswith(INSTRUCTION.strip()) else question + INSTRUCTION
        return Problem(prompt=prompt, response=response, answer=answer)

    def answer(self, row: Mapping[str, str]) -> str:
        """The answer of a row, without its box; empty where it has none."""
        return row["answer"].strip()

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        found = last_box(completion)
        return found is not None and same_math(found, answer)
