r"""Questions and answers of any kind: .jsonl or .parquet files with the two columns (or columns mapped by data.fields).

A row looks like this one (made up):

    {"question": "Which planet has the shortest year?", "answer": "Mercury"}

The final answer of a row or completion is its last \boxed{}, else the text after its last "####", else the whole text.
There is no official grader. Numbers, with a unit or without, lists of numbers and formulas are compared by value
(`math_grader`). Everything else, such as dates, times, phone numbers and names with digits, is compared as text,
ignoring case, spacing and a trailing full stop.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from rcd_core.errors import UserError
from rcd_core.tasks.answers import final_text
from rcd_core.tasks.base import Problem, no_generator
from rcd_core.tasks.exact import exact_number
from rcd_core.tasks.math_grader import same_math
from rcd_core.tasks.math_structure import is_whole
from rcd_core.tasks.math_text import normalise
from rcd_core.tasks.units import split_unit

_DATE_OR_PHONE = re.compile(r"\+?[\d\s()./:-]+")
_FORMULA = re.compile(r"\\[A-Za-z{]|[\^=+*]|\d\s*,\s*[-.\d]")


class Qa:
    name = "qa"
    infill = False
    fields: tuple[str, ...] = ("question", "answer")

    def synthetic(self, index: int, split: str, seed: int) -> dict[str, str]:
        raise no_generator(self.name, split, "hf://OWNER/NAME:SPLIT with data.fields")

    def problem(self, row: Mapping[str, str]) -> Problem:
        response = row["answer"].strip()
        answer = final_text(response)
        if not _normal(answer):
            raise UserError("the answer is empty")
        return Problem(prompt=row["question"].strip(), response=response, answer=answer)

    def grade(self, prompt: str, completion: str, answer: str) -> bool:
        text, expected = final_text(completion), final_text(answer)
        if _is_mathematical(expected):
            return same_math(text, expected)
        return bool(_normal(expected)) and _normal(text) == _normal(expected)


def _is_mathematical(text: str) -> bool:
    value, _ = split_unit(normalise(text))
    if exact_number(value) is not None:
        return True
    return _DATE_OR_PHONE.fullmatch(text) is None and _FORMULA.search(value) is not None and is_whole(value)


def _normal(text: str) -> str:
    """The text without case, double spaces, emphasis and full stop. An answer in LaTeX's text braces is its content."""
    text = re.sub(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}", r"\1", unicodedata.normalize("NFKC", text)).casefold()
    return " ".join(text.split()).strip("*`$ ").rstrip(".").strip("*`$ ")
