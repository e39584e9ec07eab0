r"""Numbers as people and models write them, read exactly: 1,200.50, 4.5e33, 4.5\times10^{33}, 2 1/2, \frac{3}{4}."""

from __future__ import annotations

import re
from fractions import Fraction

# Commas separate groups of three digits; anything else with a comma is a list.
_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_POWER = r"(?:[eE]([-+]?\d{1,4})|\s*(?:\\times|\\cdot|[x*])\s*10\s*\^\s*(?:\{\s*([-+]?\d{1,4})\s*\}|(-?\d{1,4})))"
_SCIENTIFIC = re.compile(rf"({_DECIMAL}){_POWER}?")
_QUOTIENT = re.compile(rf"({_DECIMAL})\s*/\s*({_DECIMAL})")
_FRAC = r"\\[dtc]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(-?\d+)\s*\}|(\d))"
_LATEX_FRACTION = re.compile(_FRAC)
_MIXED = re.compile(rf"(\d+)(?:\s+(\d+)\s*/\s*(\d+)|\s*{_FRAC})")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))")


MOST_DIGITS = 4000  # Python refuses to read more than 4,300 by default


def exact_number(text: str) -> Fraction | None:
    """The value of one number with an optional sign; None for anything else, lists and expressions included, and for a
    number so long that Python does not read it."""
    text = text.strip()
    if len(text) > MOST_DIGITS:
        return None
    sign = -1 if text.startswith("-") else 1
    value = _magnitude(text[1:].lstrip() if text.startswith(("-", "+")) else text)
    return None if value is None else sign * value


def _magnitude(text: str) -> Fraction | None:
    if match := _SCIENTIFIC.fullmatch(text):
        exponent = next((group for group in match.groups()[1:] if group), "0")
        return _decimal(match[1]) * Fraction(10) ** int(exponent)
    if match := _QUOTIENT.fullmatch(text):
        return _ratio(_decimal(match[1]), _decimal(match[2]))
    if match := _LATEX_FRACTION.fullmatch(text):
        return _ratio(*(Fraction(a or b) for a, b in (match.groups()[:2], match.groups()[2:])))
    if match := _MIXED.fullmatch(text):
        top, bottom = match[2] or match[4] or match[5], match[3] or match[6] or match[7]
        part = _ratio(Fraction(top), Fraction(bottom))
        return None if part is None or not 0 <= part < 1 else int(match[1]) + part
    if match := _REPEATING.fullmatch(text):
        head, period = match[2], match[3] or match[4]
        repeated = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(head))
        return _decimal(f"{match[1] or '0'}.{head}") + repeated
    return None


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").rstrip(".") or "0")


def _ratio(top: Fraction, bottom: Fraction) -> Fraction | None:
    return top / bottom if bottom else None
