"""Final answers written as "#### 42", the convention of GSM8K.

The official grader takes the number behind the first "####" and compares it as text without commas:
https://github.com/openai/grade-school-math/blob/2909d34ef28520753df82a2234c357259d254aa8/grade_school_math/dataset.py
We ask for the same marker and compare as numbers, so that "$1,200", "1200." and "1200.00" are one answer.
"""

from __future__ import annotations

import re
from decimal import Decimal

_FINAL = re.compile(r"####\s*(-?)\s*\$?\s*(-?)(\d[\d,]*(?:\.\d+)?|\.\d+)")


def final_number(text: str) -> Decimal | None:
    """The number behind the first "####" that has one, or None. Units and full stops behind it are ignored."""
    match = _FINAL.search(text)
    if match is None:
        return None
    value = Decimal(match[3].replace(",", ""))
    return -value if match[1] or match[2] else value


def same_final_number(completion: str, answer: str) -> bool:
    """Whether both texts end in the same number. An answer without a number is never matched."""
    expected = final_number(answer)
    return expected is not None and final_number(completion) == expected
