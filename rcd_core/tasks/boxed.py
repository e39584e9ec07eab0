r"""Tasks whose answer is in a \boxed{}: MATH, MATH-500, MinervaMath and AIME.

The prompt is the question and a sentence that asks for the box. The last box of a completion is compared with the
answer by math-verify (`math_grader`), which the paper's evaluation uses through lighteval. Official graders of MATH and
MATH-500 normalise LaTeX and compare text; PRM800K's then compares by sympy:
https://github.com/hendrycks/math/blob/357963a7f5501a6c1708cf3f3fb0cdf525642761/modeling/math_equivalence.py
https://github.com/openai/prm800k/blob/main/prm800k/grading/grader.py
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from rcd_core.errors import UserError
from rcd_core.tasks.answers import last_box
from rcd_core.tasks.base import Problem, no_generator
from rcd_core.tasks.math_grader import same_math

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
# What NuminaMath and OpenR1-Math write as the answer of questions that have none.
_NO_ANSWER = re.compile(r"(?:\\text\{)?\s*(?:proof|not\s?found)\s*\}?\.?", re.IGNORECASE)


class BoxedTask:
    """A task with the fields question and answer, and optionally solution. hub: its dataset, for error messages."""

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
        if _NO_ANSWER.fullmatch(answer):
            raise UserError("the answer is the word proof or notfound: the question has no final answer")
        response = row["solution"].strip() if "solution" in self.fields else ""
        if last_box(response) is None:  # otherwise the model would not learn to write one
            response = f"{response}\n\\boxed{{{answer}}}".strip()
        prompt = question if question.endswith(INSTRUCTION.strip()) else question + INSTRUCTION
        return Problem(prompt=prompt, response=response, answer=answer)

    def answer(self, row: Mapping[str, str]) -> str:
        """The answer of a row without its box; empty if there is none."""
        return row["answer"].strip()

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        box = last_box(completion)
        return box is not None and same_math(box, answer)


class Math(BoxedTask):
    r"""Problems with a worked solution: OpenR1-Math, OpenMathInstruct-2, MATH.

    A row looks like this one (made up):

        {"question": "A square has a diagonal of $2$. What is its area?",
         "solution": "With side $s$ we have $2 s^2 = 4$, so the area is $s^2 = \\boxed{2}$.", "answer": "2"}

    data.fields maps other column names, such as generated_solution and expected_answer of OpenMathInstruct-2.
    """

    name = "math"
    hub = "hf://HuggingFaceH4/MATH-500@default:test"
    fields: tuple[str, ...] = ("question", "solution", "answer")


class Math500(BoxedTask):
    r"""500 problems of MATH (Hendrycks et al. 2021) that PRM800K held out, for evaluation, without solutions.

    A row looks like this one (made up):

        {"question": "Write the set of all real $x$ with $x^2 \\le 9$ as an interval.", "answer": "[-3,3]"}
    """

    name = "math500"
    hub = "hf://HuggingFaceH4/MATH-500@default:test"


class MinervaMath(BoxedTask):
    r"""OCWCourses, undergraduate science from MIT OpenCourseWare (Lewkowycz et al. 2022, arXiv 2206.14858).

    A row looks like this one (made up); the answer is the solution's last box:

        {"question": "A spring of stiffness 8 N/m is stretched by 0.5 m. How much energy does it hold, in joules?",
         "solution": "$E = \\frac{1}{2} k x^2 = \\frac{1}{2} \\cdot 8 \\cdot 0.25 = \\boxed{1}$ J"}

    A one-line solution without a box is the bare answer (data.fields: {solution: answer}). The commonly used grader has
    a relative tolerance of 1e-4, ours has none:
    https://github.com/QwenLM/Qwen2.5-Math/blob/a45202bd16f1ec06f433442dc1152d0074773465/evaluation/grader.py
    """

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


class Aime24(BoxedTask):
    r"""AIME 2024: 30 competition problems whose answers are integers from 0 to 999.

    A row looks like this one (made up); the answer may be a number in the file:

        {"question": "How many positive integers below $100$ are divisible by $7$ but not by $2$?", "answer": "7"}

    The paper draws 16 samples at temperature 0.6 and reports pass@1 (`pass_at_1` of outcomes.py). lighteval's grader:
    https://github.com/huggingface/Math-Verify/blob/5d148cfaaf99214c2e4ffb4bc497ab042c592a7a/src/math_verify/grader.py
    """

    name = "aime24"
    hub = "hf://HuggingFaceH4/aime_2024:train"


class Aime25(Aime24):
    """AIME 2025, as AIME 2024."""

    name = "aime25"
    hub = "hf://math-ai/aime25:test"
