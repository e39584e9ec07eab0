r"""The official graders of GSM8K and MATH, in our own code: answers are compared as texts.

GSM8K takes the first number after the first "#### " that has one and drops commas; MATH normalises the last box.
https://github.com/openai/grade-school-math/blob/2909d34ef28520753df82a2234c357259d254aa8/grade_school_math/dataset.py
https://github.com/hendrycks/math/blob/357963a7f5501a6c1708cf3f3fb0cdf525642761/modeling/math_equivalence.py
"""

from __future__ import annotations

import re

from rcd_core.tasks.answers import MARKER, last_box

_GSM8K = re.compile(rf"{MARKER} (-?[0-9.,]+)")
_REMOVED = ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")


def gsm8k(completion: str, answer: str) -> bool:
    """Whether the first numbers after the marker are the same text. A gold answer without a number matches nothing."""
    gold = _GSM8K.search(answer if MARKER in answer else f"{MARKER} {answer.strip()}")
    match = _GSM8K.search(completion)
    return gold is not None and match is not None and gold[1].replace(",", "") == match[1].replace(",", "")


def math(completion: str, answer: str) -> bool:
    """Whether the last box and the gold answer are the same text after MATH's normalisation."""
    start = completion.rfind("\\boxed")  # an \\fbox is never unwrapped
    box = last_box(completion[start:]) if start >= 0 and completion.startswith("\\boxed{", start) else None
    return box is not None and math_equal(box, answer)


def math_equal(a: str, b: str) -> bool:
    """MATH's `is_equiv`: what its normalisation cannot read is compared as it is."""
    try:
        return _normal(a) == _normal(b)
    except (ValueError, IndexError):
        return a == b


def _normal(text: str) -> str:
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for part in _REMOVED:
        text = text.replace(part, "")
    if "\\text{ " in text:
        text, _ = text.split("\\text{ ")  # ValueError if there are two
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _braced_roots(text).replace(" ", "")
    text = _braced_fractions(text)
    if text == "0.5":
        text = "\\frac{1}{2}"
    match = re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text, re.ASCII)
    return f"\\frac{{{match[1]}}}{{{match[2]}}}" if match else text


def _braced_roots(text: str) -> str:
    first, *rest = text.split("\\sqrt")
    return first + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest)


def _braced_fractions(text: str) -> str:
    first, *rest = text.split("\\frac")
    result = first
    for part in rest:
        if part[0] == "{":
            result += "\\frac" + part
            continue
        if len(part) < 2:
            return text
        bottom = part[1] if part[1] == "{" else f"{{{part[1]}}}"
        result += f"\\frac{{{part[0]}}}{bottom}{part[2:]}"
    return result
