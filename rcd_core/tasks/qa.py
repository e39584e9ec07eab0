r"""Questions and answers of any kind: .jsonl or .parquet files with the two columns (or columns mapped by data.fields).

A row looks like this one (made up):

    {"question": "Which planet has the shortest year?", "answer": "Mercury"}

The final answer of a row or completion is its last \boxed{}, else the text after its last "####", else the whole text.
There is no official grader. Answers that contain a digit, a backslash, "=" or "^" are compared by math-verify
(`math_grader`), others as text, ignoring case, spacing and a trailing full stop.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from rcd_core.errors import UserError
from rcd_core.tasks.answers import final_text
from rcd_core.tasks.base import Problem, no_generator
from rcd_core.tasks.math_grader import same_math

_MATHEMATICAL = re.compile(r"[\d\\=^]")


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
        if _MATHEMATICAL.search(expected):
            return same_math(text, expected)
        return bool(_normal(expected)) and _normal(text) == _normal(expected)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".").strip()
