r"""Compares mathematical answers: exactly where that is possible, else by math-verify in a worker process.

Answers are normalised (`math_text`), units of a closed list are split off (`units`), and lists, brackets, relations and
bases are compared part by part (`math_structure`). What is not mathematics as a whole is compared as text.
math-verify (https://github.com/huggingface/Math-Verify) parses LaTeX into sympy and compares values, sets, intervals,
matrices and relations. Sympy may never return, so each grading process has one worker (`math_worker.py`), started on
first use. At the deadline the worker's alarm ends it: the pair counts as different, and the next pair gets a new
worker. Unlike math-verify's own timeouts this works from any thread. A worker whose parent has ended reads the end of
its input and exits. Equal texts and pairs of plain numbers are decided here: most pairs never reach the worker.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from rcd_core.errors import UserError
from rcd_core.tasks.exact import exact_number
from rcd_core.tasks.math_structure import (
    as_text,
    brackets,
    in_base,
    is_whole,
    relations,
    split_list,
    unwrap_subscripts,
    without_name,
)
from rcd_core.tasks.math_text import normalise
from rcd_core.tasks.units import split_unit

SECONDS = 10.0  # slower pairs count as different; most take milliseconds
_WORKER = Path(__file__).with_name("math_worker.py")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # keep spaces between digits: "1 2" is not 12
_MIXED = re.compile(r"(?<![\d.}^_/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\\circ")
_MOST_PARTS = 64  # longer lists are compared as text


def same_math(answer: str, expected: str, seconds: float = SECONDS) -> bool:
    r"""Whether `answer` equals `expected`, both as written in a box, LaTeX or plain.

    Not symmetric: x = 5 is right for 5, and a unit may be missing on either side but must agree if both have one.
    Numbers must be equal, or to six decimals if one of them is an expression (1/3 and 0.333333). Lists and sets are
    compared in any order, tuples and intervals in theirs. An empty text equals nothing.
    """
    a, b = normalise(answer), normalise(expected)
    return bool(a) and bool(b) and _same(a, b, seconds)


def _same(a: str, b: str, seconds: float) -> bool:
    """Whether two normalised answers are equal."""
    if not a or not b:
        return False
    if _SPACE.sub("", a) == _SPACE.sub("", b):
        return True
    (a, unit), (b, expected_unit) = split_unit(a), split_unit(b)
    if unit and expected_unit and unit != expected_unit:
        return False
    x, y = exact_number(a), exact_number(b)
    if x is not None and y is not None and "percent" in (unit, expected_unit) and unit != expected_unit:
        return x == y or (x / 100 == y if unit else x == y / 100)
    if x is not None and y is not None and (x == y or not _rounded(a, b)):
        return x == y
    a, b = (unwrap_subscripts(text) for text in (a, b))
    based, expected_base = in_base(a), in_base(b)
    if based or expected_base:
        return based == expected_base
    named, expected_name = without_name(a), without_name(b)
    if (named == a) != (expected_name == b):
        return _same(named, expected_name, seconds)
    parts, expected_parts = _parts(a), _parts(b)
    if parts and expected_parts:
        return parts[0] == expected_parts[0] and _same_parts(parts[1], expected_parts[1], parts[0] == "{}", seconds)
    if not (_is_mathematics(a) and _is_mathematics(b)):
        return as_text(a) == as_text(b)
    if a.casefold() == b.casefold():  # math-verify ignores the case of texts
        return _SPACE.sub("", a) == _SPACE.sub("", b)
    if (parts or expected_parts) and not re.search(r"\\pm|\\mp|\\cup|\\le|\\ge|[<>|]|\\in(?![a-z])", a + b):
        return False  # a list against one value
    kinds = [sorted(relations(text)) for text in (a, b)]
    if kinds[0] != kinds[1] and not _mirrored(kinds) and not _is_interval(b if kinds[0] else a):
        return False
    return _GRADER.verify(_for_worker(a), _for_worker(b), seconds)


def _rounded(a: str, b: str) -> bool:
    """Whether one number is a decimal and the other a fraction: then six decimals are enough."""
    return ("frac" in a or "/" in a) != ("frac" in b or "/" in b)


def _parts(text: str) -> tuple[str, list[str]] | None:
    """(kind, parts) of a list, set, tuple or interval; the kind is its brackets, of lists and sets "{}"."""
    if exact_number(text) is not None or "\\begin" in text:
        return None
    parts = split_list(text)
    if len(parts) > 1:
        return ("{}", parts) if "\\pm" not in text else None
    enclosed = brackets(text)
    if enclosed is None or "\\pm" in text or text.startswith("{"):
        return None
    opening, content, closing = enclosed
    parts = split_list(content)
    if len(parts) == 1 and opening == "(":
        return None
    return opening + closing, parts


def _same_parts(parts: list[str], expected: list[str], in_any_order: bool, seconds: float) -> bool:
    if len(parts) != len(expected) or len(parts) > _MOST_PARTS:
        return False
    if not in_any_order:
        return all(_same(a, b, seconds) for a, b in zip(parts, expected, strict=True))
    rest = list(expected)
    for part in parts:
        match = next((i for i, other in enumerate(rest) if _same(part, other, seconds)), None)
        if match is None:
            return False
        del rest[match]
    return True


def _is_mathematics(text: str) -> bool:
    return is_whole(text) and (re.search(r"[\d\\^=+*/()<>\[\]-]", text) is not None or len(text) == 1)


def _is_interval(text: str) -> bool:
    return re.search(r"[\[(].*,.*[\])]|\\cup|\\infty", text) is not None


def _mirrored(kinds: list[list[str]]) -> bool:
    """Whether the second relations are the first ones read from right to left."""
    mirror = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
    return sorted(mirror.get(kind, kind) for kind in kinds[0]) == kinds[1]


def _for_worker(text: str) -> str:
    """The spelling that math-verify reads: mixed numbers as fractions, degrees inside functions in radians."""
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if "(" not in text and "[" not in text else text
    return _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)


class _Grader:
    """The worker process and its pipes, shared by all threads under a lock."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget the worker without ending it: after a fork it belongs to the parent."""
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None

    def verify(self, answer: str, expected: str, seconds: float) -> bool:
        """Ask the worker. False at the deadline, or if the worker ends twice for another reason."""
        line = json.dumps([answer, expected, seconds]) + "\n"
        with self._lock:
            for _ in range(2):  # an idle worker may have been killed from outside
                worker = self._worker = self._worker or _start()
                reply = _ask(worker, line)
                if reply:
                    return reply == "same\n"
                self.close()
                if worker.returncode == -signal.SIGALRM:
                    break
        return False

    def close(self) -> None:
        """End the worker, if any, and wait for it."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        assert worker.stdin and worker.stdout
        if worker.poll() is None:
            worker.kill()
        worker.wait()
        worker.stdout.close()
        with suppress(BrokenPipeError):  # an unread request
            worker.stdin.close()


def _start() -> subprocess.Popen[str]:
    # -P: modules next to the worker must not hide others of the same name.
    worker = subprocess.Popen(
        [sys.executable, "-P", str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout
    if worker.stdout.readline() != "ready\n":
        worker.wait()
        raise UserError(
            f"the grading process ended at its start with code {worker.returncode}; it needs the package math-verify: "
            "pip install math-verify"
        )
    return worker


def _ask(worker: subprocess.Popen[str], line: str) -> str:
    """The worker's reply; empty if the worker has ended."""
    assert worker.stdin and worker.stdout
    try:
        worker.stdin.write(line)
        worker.stdin.flush()
        return worker.stdout.readline()
    except BrokenPipeError:
        return ""


_GRADER = _Grader()
atexit.register(_GRADER.close)
os.register_at_fork(after_in_child=_GRADER.forget)
