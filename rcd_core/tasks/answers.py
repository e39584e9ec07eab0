r"""Final answers: a number behind "####", the convention of GSM8K, or anything in \boxed{}, the convention of MATH.

The official grader of GSM8K takes the number behind the first "####" and compares it as text without commas:
https://github.com/openai/grade-school-math/blob/2909d34ef28520753df82a2234c357259d254aa8/grade_school_math/dataset.py
We ask for the same marker and compare as numbers, so that "$1,200", "1200." and "1200.00" are one answer. Models tuned
on mathematics box their answers instead: where a completion has no such number, its last box counts.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rcd_core.tasks.math_grader import same_math

MARKER = "####"
_FINAL = re.compile(rf"{MARKER}\s*(-?)\s*\\?\$?\s*(-?)(\d[\d,]*(?:\.\d+)?|\.\d+)(?:/(\d+))?")
_BOXES = ("\\boxed{", "\\fbox{")


def final_number(text: str) -> Fraction | None:
    """The number behind the first "####" that has one, or None. Units and full stops behind it are ignored."""
    match = _FINAL.search(text)
    if match is None or (match[4] is not None and not int(match[4])):
        return None
    value = Fraction(match[3].replace(",", "")) / int(match[4] or 1)
    return -value if match[1] or match[2] else value


def same_final_number(completion: str, answer: str) -> bool:
    """Whether a completion ends in the answer's number. An answer without a number is never matched."""
    expected = final_number(answer)
    found = final_number(completion)
    if expected is None or found is not None:
        return expected is not None and found == expected
    box = last_box(completion)
    return box is not None and same_math(box, str(expected))


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


def final_text(text: str) -> str:
    """The final answer as it is written: in the last box, else behind the last "####", else the whole text."""
    box = last_box(text)
    if box is not None:
        return box.strip()
    _, marker, behind = text.rpartition(MARKER)
    return (behind.strip().partition("\n")[0] if marker else text).strip()
