r"""MinervaMath: OCWCourses, undergraduate science from MIT OpenCourseWare (Lewkowycz et al. 2022, arXiv 2206.14858).

A row looks like this one (made up); the answer is the solution's last box:

    {"question": "A spring of stiffness 8 N/m is stretched by 0.5 m. How much energy does it hold, in joules?",
     "solution": "$E = \\frac{1}{2} k x^2 = \\frac{1}{2} \\cdot 8 \\cdot 0.25 = \\boxed{1}$ J"}

A solution of one line without a box is taken for the bare answer (data.fields: {solution: answer}). The grader of the
collection that is in use compares with a relative tolerance of 1e-4, which ours has not:
https://github.com/QwenLM/Qwen2.5-Math/blob/a45202bd16f1ec06f433442dc1152d0074773465/evaluation/grader.py
"""

from __future__ import annotations

from collections.abc import Mapping

from rcd_core.errors import UserError
from rcd_core.tasks.answers import last_box
from rcd_core.tasks.base import Problem
from rcd_core.tasks.boxed import BoxedTask


class MinervaMath(BoxedTask):
    name = "minerva_math"
    hub = "hf://math-ai/minervamath:test with data.fields.solution=answer"
    fields: tuple[str, ...] = ("question", "solution")

    def problem(self, row: Mapping[str, str]) -> Problem:
        if last_box(row["solution"]) is None and "\n" in row["solution"].strip():
            raise UserError("the solution has no \\boxed{} answer")
        return super().problem(row)

    def answer(self, row: Mapping[str, str]) -> str:
        box = last_box(row["solution"])
        return (row["solution"] if box is None else box).strip()
