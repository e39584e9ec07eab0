r"""Mathematics with a worked solution and a final answer in \boxed{}: OpenR1-Math, OpenMathInstruct-2, MATH-500.

A row looks like this one (made up):

    {"question": "A square has a diagonal of $2$. What is its area?",
     "solution": "With side $s$ we have $2 s^2 = 4$, so the area is $s^2 = \\boxed{2}$.", "answer": "2"}

Most data sets name the first column `problem`, OpenMathInstruct-2 the others `generated_solution` and
`expected_answer`: data.fields says so. The official grader of MATH, which normalises LaTeX and compares text, is
https://github.com/hendrycks/math/blob/357963a7f5501a6c1708cf3f3fb0cdf525642761/modeling/math_equivalence.py
"""

from __future__ import annotations

from rcd_core.tasks.boxed import INSTRUCTION, BoxedTask

__all__ = ["INSTRUCTION", "Math"]


class Math(BoxedTask):
    name = "math"
    hub = "hf://HuggingFaceH4/MATH-500@default:test"
    fields: tuple[str, ...] = ("question", "solution", "answer")
