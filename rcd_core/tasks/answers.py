r"""Final answers: a number after "####" (GSM8K's convention) or text in \boxed{} (MATH's convention).

The official grader of GSM8K compares the text of the number after the first "####", without commas:
https://github.com/openai/grade-school-math/blob/2909d34ef28520753df82a2234c357259d254aa8/grade_school_math/dataset.py
We compare values, so that "$1,200", "1200." and "1200.00" are equal. Models tuned on mathematics box their answers
instead: if a completion has no number after "####", its last box counts.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rcd_core.tasks.math_grader import same_math

MARKER = "####"
_FINAL = re.compile(rf"{MARKER}\s*(-?)\s*\\?\$?\s*(-?)(\d[\d,]*(?:\.\d+)?|\.\d+)(?:/(\d+))?")
_BOXES = ("\\boxed{", "\\fbox{")


def final_number(text: str) -> Fraction | None:
    """The number after the first "####" that has one, or None. Trailing units and full stops are ignored."""
    match = _FINAL.search(text)
    if match is None or (match[4] is not None and not int(match[4])):
        return None
    value = Fraction(match[3].replace(",", "")) / int(match[4] or 1)
    return -value if match[1] or match[2] else value


def same_final_number(completion: str, answer: str) -> bool:
    """Whether a completion's final number equals the answer's. An answer without a number matches nothing."""
    expected, number = final_number(answer), final_number(completion)
    if expected is None or number is not None:
        return expected is not None and number == expected
    box = last_box(completion)
    return box is not None and same_math(box, str(expected))


def last_box(text: str) -> str | None:
    r"""The content of the last \boxed{...} with balanced braces, or None."""
    start, opening = max((text.rfind(box), len(box)) for box in _BOXES)
    if start < 0:
        return None
    depth = 1
    for i in range(start + opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[start + opening : i]
    return None


def final_text(text: str) -> str:
    """The final answer as text: the last box, else the line after the last "####", else the whole text."""
    box = last_box(text)
    if box is not None:
        return box.strip()
    _, marker, rest = text.rpartition(MARKER)
    return (rest.strip().partition("\n")[0] if marker else text).strip()
