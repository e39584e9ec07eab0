r"""Mathematics with a worked solution and a final answer in \boxed{}: OpenR1-Math, OpenMathInstruct-2, MATH-500.

A row looks like this one (made up):

    {"question": "A square has a diagonal of $2$. What is its area?",
     "solution": "With side $s$ we have $2 s^2 = 4$, so the area is $s^2 = \\boxed{2}$.", "answer": "2"}

The data sets name the first column `problem`, OpenMathInstruct-2 the others `generated_solution` and `expected_answer`:
data.fields says so. The official grader of MATH, which normalises LaTeX before it compares, is
https://github.com/hendrycks/math/blob/357963a7f5501a6c1708cf3f3fb0cdf525642761/modeling/math_equivalence.py
This one compares what stands in the last box as text, without spaces and dollar signs, or as plain numbers: it never
takes a wrong answer for right, and misses right ones that are written differently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

from rcd_core.errors import UserError
from rcd_core.tasks.base import Problem

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
_NUMBER = re.compile(r"-?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?|-?\.\d+")
_BOXES = ("\\boxed{", "\\fbox{")


class Math:
    name = "math"
    infill = False
    fields: tuple[str, ...] = ("question", "solution", "answer")

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        raise UserError(
            f"data.{split} is 'synthetic' but task {self.name!r} has no generator; "
            "give a .jsonl or .parquet file, or hf://HuggingFaceH4/MATH-500@default:test"
        )

    def problem(self, row: Mapping[str, str]) -> Problem:
        question, solution, answer = (row[name].strip() for name in self.fields)
        if not answer:
            raise UserError("the answer is empty")
        if last_box(solution) is None:
            solution += f"\n\\boxed{{{answer}}}"  # otherwise the model would never learn to give one
        prompt = question if question.endswith(INSTRUCTION.strip()) else question + INSTRUCTION
        return Problem(prompt=prompt, response=solution, answer=answer)

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        found = last_box(completion)
        return found is not None and same_answer(found, answer)


def last_box(text: str) -> str | None:
    r"""What stands in the last \boxed{...}, braces counted; None without one that is closed."""
    start, opening = max((text.rfind(box), len(box)) for box in _BOXES)
    if start < 0:
        return None
    depth = 1
    for i in range(start + opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[start + opening : i]
    return None


def same_answer(one: str, other: str) -> bool:
    """As text without spaces and dollar signs, or as decimal numbers, with commas between thousands or without."""
    a, b = ("".join(text.split()).replace("$", "").rstrip(".") for text in (one, other))
    x, y = _number(a), _number(b)
    return x == y if x is not None and y is not None else bool(a) and a == b


def _number(text: str) -> Decimal | None:
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None
