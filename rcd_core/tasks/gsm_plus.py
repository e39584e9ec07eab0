"""GSM-Plus: GSM8K's test questions changed in eight ways, for robustness (Li et al. 2024, arXiv 2402.19255).

A row looks like this one (made up):

    {"question": "A rope of 3 m is cut into pieces of 0.5 m. How many pieces are there?",
     "solution": "There are 3 / 0.5 = 6 pieces.", "answer": "6"}

One way leaves out what the question needs; its answer is "None", and right is a completion that ends in "#### None" or
boxes None. The official grader accepts phrases such as "does not provide enough information" for it as well, takes the
last number of a text that has no marker, and can leave these rows out:
https://github.com/qtli/GSM-Plus/blob/2f04a4b68a23f0db4d0b0eaa79fd0cfe6e4375b2/scripts/utils/extract_ans.py
"""

from __future__ import annotations

from collections.abc import Mapping

from rcd_core.tasks.answers import MARKER, final_text
from rcd_core.tasks.base import Problem
from rcd_core.tasks.gsm8k import Gsm8k

UNANSWERABLE = f"{MARKER} None"


class GsmPlus(Gsm8k):
    name = "gsm_plus"
    hub = "hf://qintongli/GSM-Plus:test"
    fields: tuple[str, ...] = ("question", "solution", "answer")

    def problem(self, row: Mapping[str, str]) -> Problem:
        if _is_none(row["answer"]):
            return Problem(prompt=row["question"].strip(), response=self.response(row), answer=UNANSWERABLE)
        return super().problem(row)

    def response(self, row: Mapping[str, str]) -> str:
        """The solution, with the answer's marker in place of whatever marker it has."""
        solution = row["solution"].partition(MARKER)[0].strip()
        return f"{solution}\n{MARKER} {final_text(row['answer'])}"

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        if _is_none(answer):
            return _is_none(completion)
        return super().grade(prompt, completion, answer)


def _is_none(text: str) -> bool:
    return final_text(text).rstrip(".").casefold() == "none"
