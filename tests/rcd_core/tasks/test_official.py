"""The official graders: what they accept, also where the default judges differently."""

from __future__ import annotations

import pytest

from rcd_core.errors import UserError
from rcd_core.tasks import grade
from rcd_core.tasks.official import math_equal


@pytest.mark.parametrize(
    ("completion", "answer", "official", "default"),
    [
        ("so\n#### 18", "18", True, True),
        ("#### 1,800", "#### 1800", True, True),
        ("#### 24 - 3 = 21", "#### 21", False, True),
        ("#### 24 - 3 = 21", "#### 24", True, False),
        ("#### 1. Boxes\n#### 21", "#### 21", False, True),
        ("#### $18", "#### 18", False, True),
        ("#### 18.00", "#### 18", False, True),
        ("#### 18.", "#### 18", False, True),
        ("####18", "#### 18", False, True),
        ("#### **18**", "#### 18", False, True),
        ("#### $5\n#### 18", "#### 18", True, False),
        (r"\boxed{18}", "#### 18", False, True),
        ("#### 7, 250", "#### 7", True, False),
        ("none", "none", False, False),
    ],
)
def test_gsm8k(completion: str, answer: str, official: bool, default: bool) -> None:
    assert grade("gsm8k", completion, answer, grader="official") is official
    assert grade("gsm8k", completion, answer) is default


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (r"\frac12", r"\dfrac{1}{2}", True),
        (r"\tfrac{1}2", r"\frac{1}{2}", False),
        (r"\frac1{2}", r"\frac{1}{2}", True),
        ("0.5", r"\frac12", True),
        ("0.25", r"\frac14", False),
        ("1/2", r"\frac{1}{2}", True),
        ("-3/4", r"\frac{-3}{4}", True),
        ("x/2", r"\frac{x}{2}", False),
        ("x = 5", "5", True),
        ("x=5", "5", True),
        ("xy=5", "5", True),
        ("x+y=5", "5", False),
        (r"5\text{ cm}", "5", True),
        (r"5\text{cm}", "5", False),
        (r"90^{\circ}", "90", True),
        (r"50\%", "50", True),
        (r"\$18", "18", True),
        (r"\sqrt2", r"\sqrt{2}", True),
        (r"\left( 1, 2 \right)", "(1,2)", True),
        ("(1,2)", "(1, 3)", False),
        (".5", "0.5", True),
        (".25", "0.25", True),
        ("2,1", "1,2", False),
        ("1,000", "1000", False),
        (r"10,\!080", "10,080", True),
        (r"1\text{ a}\text{ b}", r"1\text{ a}\text{ b}", True),
        (r"1\text{ a}\text{ b}", "1", False),
        (r"\frac", r"\frac", True),
        ("", "", True),
    ],
)
def test_math(a: str, b: str, equal: bool) -> None:
    assert math_equal(a, b) is equal


def test_math_reads_the_last_box_only() -> None:
    assert grade("math500", r"\boxed{4}, no: \boxed{\frac12}", "0.5", grader="official")
    assert not grade("math500", r"\boxed{0.5} or \boxed{4}", "0.5", grader="official")
    assert not grade("math500", r"\fbox{3}", "3", grader="official") and grade("math500", r"\fbox{3}", "3")
    assert not grade("math500", "3", "3", grader="official")


def test_other_tasks_have_one_grader_and_unknown_graders_are_refused() -> None:
    assert grade("qa", "Paris", "paris", grader="official")
    with pytest.raises(UserError, match="grader.*'theirs'"):
        grade("qa", "Paris", "paris", grader="theirs")
