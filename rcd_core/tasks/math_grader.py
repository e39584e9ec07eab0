r"""Compares mathematical answers by math-verify, in a worker process with a deadline.

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
from decimal import Decimal
from pathlib import Path

from rcd_core.errors import UserError

SECONDS = 10.0  # slower pairs count as different; most take milliseconds
_WORKER = Path(__file__).with_name("math_worker.py")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # keep spaces between digits: "1 2" is not 12
_NUMBER = re.compile(
    r"(?P<mantissa>[-+]?(?:(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d*)?|\.\d+))"
    r"(?:[eE](?P<e>[-+]?\d{1,6})|\\(?:times|cdot)10\^(?:\{(?P<power>[-+]?\d{1,6})\}|(?P<digit>\d)))?"
)
_E_NOTATION = re.compile(r"(?<![\w\\.])((?:\d+\.?\d*|\.\d+))[eE]([-+]?\d+)(?![\w.])")


def same_math(answer: str, expected: str, seconds: float = SECONDS) -> bool:
    r"""Whether `answer` equals `expected`, both as written in a box, LaTeX or plain.

    Not symmetric, like math-verify: x = 5 is right for 5. Numbers must be equal, or to six decimals if one of them is
    an expression (1/3 and 0.333333). Units are ignored. An empty text equals nothing.
    """
    bare, bare_expected = _bare(answer), _bare(expected)
    a, b = (_SPACE.sub("", text) for text in (bare, bare_expected))
    if not a or not b:
        return False
    if a == b:
        return True
    x, y = plain_number(a), plain_number(b)
    if x is not None and y is not None:
        return x == y
    return _GRADER.verify(_for_latex(bare), _for_latex(bare_expected), seconds)


def plain_number(text: str) -> Decimal | None:
    r"""The value of 1,200.50, -.5, 4.5e33 or 4.5\times10^{33}; None for anything else."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    exponent = match["e"] or match["power"] or match["digit"] or "0"
    return Decimal(f"{match['mantissa'].replace(',', '')}e{exponent}")


def _bare(text: str) -> str:
    """Strip dollar signs and a trailing full stop."""
    return text.replace("\\$", "").replace("$", "").strip().rstrip(".").strip()


def _for_latex(text: str) -> str:
    """Rewrite 4.5e33 as a power of 10, because math-verify parses its e as Euler's number."""
    return _E_NOTATION.sub(r"\1\\times10^{\2}", text)


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
