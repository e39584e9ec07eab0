"""Tasks whose answer ends in "#### NUMBER": GSM8K, GSM1K and GSM-Plus. Answers are compared as `answers` describes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rcd_core.errors import UserError
from rcd_core.tasks.answers import MARKER, final_number, final_text, same_final_number
from rcd_core.tasks.base import Problem, no_generator

UNANSWERABLE = f"{MARKER} None"
_CALCULATOR = re.compile(r"<<[^<>]*>>")


class NumberTask:
    """A task with the fields question and answer, which ends in "#### NUMBER".

    GSM8K's "<<3*2=6>>" annotates calls of a calculator, which the model does not have: responses are trained without.
    """

    name: str
    infill = False
    fields: tuple[str, ...] = ("question", "answer")

    def problem(self, row: Mapping[str, str]) -> Problem:
        response = _CALCULATOR.sub("", self.response(row)).strip()
        number = final_number(response)
        if number is None:
            raise UserError("the answer does not end in '#### NUMBER'")
        return Problem(prompt=row["question"].strip(), response=response, answer=f"{MARKER} {number}")

    def response(self, row: Mapping[str, str]) -> str:
        """The worked answer of a row."""
        return row["answer"]

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        return same_final_number(completion, answer)


class Gsm8k(NumberTask):
    """Grade-school word problems with a worked answer (Cobbe et al. 2021, arXiv 2110.14168).

    A row looks like this one (made up):

        {"question": "A jug holds 3 cups and a bowl holds twice as much. How many cups do both hold?",
         "answer": "The bowl holds 3*2=<<3*2=6>>6 cups.\\nTogether they hold 3+6=<<3+6=9>>9 cups.\\n#### 9"}

    """

    name = "gsm8k"
    hub = "hf://openai/gsm8k@main:{split}"

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        raise no_generator(self.name, split, self.hub.format(split=split))


class Gsm1k(Gsm8k):
    """New problems in the style of GSM8K, to detect models that memorised its test set (Zhang et al. 2024, 2405.00332).

    A row looks like this one (made up); there is no worked answer. The official grader is GSM8K's.

        {"question": "A kiosk sells 4 papers an hour. How many does it sell in 6 hours?", "answer": "24"}
    """

    name = "gsm1k"
    hub = "hf://ScaleAI/gsm1k:test"

    def response(self, row: Mapping[str, str]) -> str:
        answer = row["answer"].strip()
        return answer if MARKER in answer else f"{MARKER} {answer}"


class GsmPlus(Gsm8k):
    """GSM8K's test questions varied in eight ways, to test robustness (Li et al. 2024, arXiv 2402.19255).

    A row looks like this one (made up):

        {"question": "A rope of 3 m is cut into pieces of 0.5 m. How many pieces are there?",
         "solution": "There are 3 / 0.5 = 6 pieces.", "answer": "6"}

    One variation removes information that the question needs. Its answer is "None", and a completion is right if it
    ends in "#### None" or boxes None. The official grader also accepts phrases such as "does not provide enough
    information", takes the last number of a text without a marker, and can skip these rows:
    https://github.com/qtli/GSM-Plus/blob/2f04a4b68a23f0db4d0b0eaa79fd0cfe6e4375b2/scripts/utils/extract_ans.py
    """

    name = "gsm_plus"
    hub = "hf://qintongli/GSM-Plus:test"
    fields: tuple[str, ...] = ("question", "solution", "answer")

    def problem(self, row: Mapping[str, str]) -> Problem:
        if _is_none(row["answer"]):
            return Problem(prompt=row["question"].strip(), response=self.response(row), answer=UNANSWERABLE)
        return super().problem(row)

    def response(self, row: Mapping[str, str]) -> str:
        """The solution without a marker of its own, then the answer behind the marker."""
        solution = row["solution"].partition(MARKER)[0].strip()
        return f"{solution}\n{MARKER} {final_text(row['answer'])}"

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        return _is_none(completion) if _is_none(answer) else super().grade(prompt, completion, answer)


def _is_none(text: str) -> bool:
    return final_text(text).rstrip(".").casefold() == "none"
