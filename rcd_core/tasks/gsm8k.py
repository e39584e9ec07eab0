"""GSM8K: grade-school word problems with a worked answer (Cobbe et al. 2021, arXiv 2110.14168).

A row looks like this one (made up):

    {"question": "A jug holds 3 cups and a bowl holds twice as much. How many cups do both hold?",
     "answer": "The bowl holds 3*2=<<3*2=6>>6 cups.\\nTogether they hold 3+6=<<3+6=9>>9 cups.\\n#### 9"}

The "<<3*2=6>>" are annotations for a calculator the model does not have; the response is trained without them.
How answers are compared, and the official grader: `answers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from rcd_core.errors import UserError
from rcd_core.tasks.answers import final_number, same_final_number
from rcd_core.tasks.base import Problem, no_generator

_CALCULATOR = re.compile(r"<<[^<>]*>>")


class Gsm8k:
    """A subclass is a data set of the same kind: it says where its rows can be had and how they are worded."""

    name = "gsm8k"
    hub = "hf://openai/gsm8k@main:{split}"
    infill = False
    fields: tuple[str, ...] = ("question", "answer")

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        raise no_generator(self.name, split, self.hub.format(split=split))

    def problem(self, row: Mapping[str, str]) -> Problem:
        response = _CALCULATOR.sub("", self.response(row)).strip()
        number = final_number(response)
        if number is None:
            raise UserError("the answer does not end in '#### NUMBER'")
        return Problem(prompt=row["question"].strip(), response=response, answer=f"#### {number}")

    def response(self, row: Mapping[str, str]) -> str:
        """The worked answer of a row, which ends in '#### NUMBER'."""
        return row["answer"]

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        return same_final_number(completion, answer)
