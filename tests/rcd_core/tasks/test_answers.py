"""Final numbers after "####" (right and wrong readings), gold answers without a marker, and answers in boxes."""

from __future__ import annotations

from fractions import Fraction

import pytest

from rcd_core.tasks import grade
from rcd_core.tasks.answers import final_number
from rcd_core.tasks.exact import exact_number

LINES: dict[str, list[str]] = {
    "21": [
        "**21**", "*21*", "__21__", "`21`", "**21.**", "Answer: 21", "**Answer:** 21", "The final answer is 21.",
        "Therefore, 21", "€21", "£21.00", "21 €", "US$21", "USD 21", "Rs. 21", r"\(21\)", "$21$", r"\$21",
        r"\boxed{21}", r"$\boxed{21}$", "24 - 3 = 21", "x = 21", "3 * 7 = $21", "24 - 3 = 21 apples", "21 apples.",
        "21 (twenty-one)", "21!", "+21", "21/day", r"21\%", r"21 \text{ dollars}", "**21 dollars**", "21, as I said",
        "\n21", "1. Boxes\n#### 21", "Step 1\n#### 21", "Total: 21", "Total: 5\n#### Sum: 21", "21\n#### 5",
    ],
    "-21": ["−21", "–21", "- 21", "-$21", "$-21", "**−21**"],
    "100": ["1e2", "1E2", "1e+2"],
    "5/2": ["2 1/2", "2½", "5/2", "2.5", r"\frac{5}{2}", r"2\frac{1}{2}", "2 1/2 cups"],
    "4500": ["4,500", r"4\,500", "4{,}500", "4\u202f500"],
}  # fmt: skip
NO_ANSWER = [
    "1. Boxes", "1) Boxes", "1: Boxes", "1 - Boxes", "Step 1", "Step 1: 5 boxes", "7, 250", "12,5", "1,2,3", "24 - 3",
    "5 < 6", "12:30", "21 or 22", "3/0", "10^2", "none", "",
]  # fmt: skip


@pytest.mark.parametrize(("number", "line"), [(n, line) for n, lines in LINES.items() for line in lines])
def test_the_number_of_a_final_line(number: str, line: str) -> None:
    completion = f"3 boxes hold 7.\n#### {line}"
    assert final_number(completion) == Fraction(number)
    assert grade("gsm8k", completion, number) and grade("gsm8k", completion, f"#### {number}")
    assert not grade("gsm8k", completion, str(Fraction(number) + 1))


@pytest.mark.parametrize("line", NO_ANSWER)
def test_a_line_that_is_no_answer_leaves_the_box(line: str) -> None:
    assert final_number(f"#### {line}") is None
    assert grade("gsm8k", f"#### {line}\nso \\boxed{{21}}", "21")
    assert not grade("gsm8k", f"#### {line}\nso \\boxed{{21}}", "1")


@pytest.mark.parametrize(
    ("gold", "completion", "right"),
    [
        ("18", "so\n#### 18", True),
        ("18", "so\n#### 19", False),
        (" $1,800 ", "#### 1800", True),
        ("1800.0", r"\boxed{1,800}", True),
        ("9*2=18\n#### 18", "#### 18", True),
        ("-18", "#### 18", False),
        ("18", "18", False),
        ("eighteen", "#### eighteen", False),
        ("18 or 19", "#### 18", False),
        ("", "#### 18", False),
    ],
)
def test_a_bare_number_is_a_gold_answer(gold: str, completion: str, right: bool) -> None:
    assert grade("gsm8k", completion, gold) is right


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,200.50", "2401/2"),
        ("-.5", "-1/2"),
        ("+3.", "3"),
        ("2E-3", "1/500"),
        (r"2\times10^{-3}", "1/500"),
        (r"2 \cdot 10^4", "20000"),
        ("2x10^-3", "1/500"),
        ("3/4", "3/4"),
        (r"-\frac34", "-3/4"),
        ("4 1/2", "9/2"),
        (r"4\frac{1}{2}", "9/2"),
        (r"0.\overline{6}", "2/3"),
        (r"1.2\overline{34}", "611/495"),
        ("7, 250", None),
        ("12,34", None),
        ("1 2", None),
        ("4 3/2", None),
        ("1/0", None),
        ("x", None),
        ("", None),
        (".", None),
        ("1e12345678", None),
    ],
)
def test_exact_numbers(text: str, value: str | None) -> None:
    assert exact_number(text) == (None if value is None else Fraction(value))
