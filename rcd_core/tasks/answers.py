r"""Final answers: a number after "####" (GSM8K's convention) or text in \boxed{} (MATH's convention).

Values are compared, so that "$1,200", "1200." and "1200.00" are equal. `official` has GSM8K's own comparison of texts.
Models tuned on mathematics box their answers: if no line after "####" is an answer, the last box counts.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rcd_core.tasks.exact import exact_number
from rcd_core.tasks.math_grader import same_math

MARKER = "####"
_BOXES = ("\\boxed{", "\\fbox{")
_LINE = re.compile(rf"{MARKER}#*[^\S\n]*(?:\n\s*)?([^\n]*)")
_MARKS = re.compile(r"\*\*|__|`|\\[()\[\]!]|\\left|\\right|\\displaystyle|\\?\$|[€£¥₹]")
_ANSWER = re.compile(
    r"^(?:(?:so|thus|hence|therefore)\b,?\s*)?(?:(?:the |my )?(?:final |correct )?answer\s*(?:is\b|:|=)?\s*:?)?", re.I
)
_CURRENCY = re.compile(r"\b(?:USD|EUR|GBP|INR|US|Rs\.?)(?=\s*[-\d.])")
_LABEL = re.compile(r"[^\d:=]+(?::|\bis\b)(?=\s*[-+.\d])", re.I)  # "Total cost:"
_HEADING = re.compile(r"\d+\s*(?:[.):]|-(?=\s))\s*[^\W\d]")  # "1. Boxes"
_NUMBER = re.compile(
    r"[-+]?\s*(?:[\d.,]*\d\.?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+|\s+\d+\s*/\s*\d+|\s*\\[dt]?frac\S*)?|\\[dt]?frac\S*)"
)
_UNIT = re.compile(r"\s*(?:\\?%|°|[/ ]?[^\W\d]|\()[^\d=:+*<>]*|\s*[.!]*")  # "apples", "/week", "(twelve)", "%"
_REMARK = re.compile(r"\s*[,;]\s+[^\W\d].*")  # "3, because ..."
_CHARACTERS = str.maketrans({"−": "-", "–": "-", "—": "-", "\u2009": ",", "\u202f": ",", "\u00a0": " ", "⁄": "/"})
_VULGAR = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "⅕": "1/5", "⅛": "1/8"}


def final_number(text: str) -> Fraction | None:
    """The number that a line after "####" gives as the answer, or None.

    The line is one number, with a unit or without; of an equation the side behind the last "=". The first such line
    counts. Headings ("#### 1. Boxes") are skipped. A line with a label other than "Answer" ("#### Total: 5") counts
    only if it is the last one and no other line is an answer.
    """
    labelled = None
    for line in _LINE.findall(text):
        value, has_label = _number_of_line(line)
        if value is not None and not has_label:
            return value
        labelled = value
    return labelled


def gold_number(answer: str) -> Fraction | None:
    """The number of a gold answer: the one after "####", or the whole text if it has no marker."""
    return final_number(answer if MARKER in answer else f"{MARKER} {answer.strip()}")


def same_final_number(completion: str, answer: str) -> bool:
    """Whether a completion's final number equals the gold answer's. A gold answer without a number matches nothing."""
    expected, number = gold_number(answer), final_number(completion)
    if expected is None or number is not None:
        return expected is not None and number == expected
    box = last_box(completion)
    return box is not None and same_math(box, str(expected))


def _number_of_line(line: str) -> tuple[Fraction | None, bool]:
    """(the number that a line gives as its answer, whether a label other than "Answer" comes before it)."""
    box = last_box(line)
    if box is not None and line.replace("boxed", "fbox").count("fbox{") == 1:
        line = line.replace(f"\\boxed{{{box}}}", f" {box} ").replace(f"\\fbox{{{box}}}", f" {box} ")
    line = re.sub(r"(?<=\d)(?:\\,|\{,\}|\\!,|,\\!)(?=\d{3}(?!\d))", ",", line).translate(_CHARACTERS)
    for character, fraction in _VULGAR.items():
        line = line.replace(character, f" {fraction}")
    line = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r" \1", line)
    line = re.sub(r"^\s*[*_]+|[*_]+(?=\s*[.!]?\s*$)", "", _MARKS.sub("", line)).strip().rstrip("\\").strip()
    line = _CURRENCY.sub("", _ANSWER.sub("", line, count=1)).strip()
    label = _LABEL.match(line)
    line = line[label.end() :] if label else line
    if _HEADING.match(line):
        return None, False
    line = line.rpartition("=")[2].strip()
    match = _NUMBER.match(line)
    if match is None or not (_UNIT.fullmatch(line[match.end() :]) or _REMARK.fullmatch(line[match.end() :])):
        return None, False
    return exact_number(re.sub(r"^([-+])\s+", r"\1", match[0].rstrip("."))), label is not None


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
