r"""Whether two mathematical answers are the same: by math-verify, in a process of its own, with a deadline.

math-verify (https://github.com/huggingface/Math-Verify) reads LaTeX into sympy and compares values, sets, intervals,
matrices and relations. Sympy can run for ever, so it runs in one worker process per grading process
(`math_worker.py`), started when first needed and used again. The worker's own alarm ends it at the deadline: the pair
counts as different and the next one gets a new worker. That works from any thread, which math-verify's own timeouts do
not, and a worker whose parent is gone reads the end of its input and leaves.

Texts that are equal but for spaces, and pairs of plain numbers, are decided here: most pairs never reach the worker.
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

SECONDS = 10.0  # a pair that takes longer is a wrong answer; the usual one takes milliseconds
_WORKER = Path(__file__).with_name("math_worker.py")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")  # not what parts digits: "1 2" is not 12
_NUMBER = re.compile(
    r"(?P<mantissa>[-+]?(?:(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d*)?|\.\d+))"
    r"(?:[eE](?P<e>[-+]?\d{1,6})|\\(?:times|cdot)10\^(?:\{(?P<power>[-+]?\d{1,6})\}|(?P<digit>\d)))?"
)
_E_NOTATION = re.compile(r"(?<![\w\\.])((?:\d+\.?\d*|\.\d+))[eE]([-+]?\d+)(?![\w.])")


def same_math(found: str, expected: str, seconds: float = SECONDS) -> bool:
    r"""Whether `found` is the answer `expected`; both as written in a box, LaTeX or plain.

    Not symmetric, as math-verify is not: x = 5 is right for 5. Numbers are equal exactly, or to six decimals where one
    of them is an expression (1/3 and 0.333333); units are ignored. An empty text is never the same as anything.
    """
    one, other = _bare(found), _bare(expected)
    a, b = (_SPACE.sub("", text) for text in (one, other))
    if not a or not b:
        return False
    if a == b:
        return True
    x, y = plain_number(a), plain_number(b)
    if x is not None and y is not None:
        return x == y
    return _GRADER.verify(_for_latex(one), _for_latex(other), seconds)


def plain_number(text: str) -> Decimal | None:
    r"""The value of 1,200.50, -.5, 4.5e33 or 4.5\times10^{33}; None for anything else."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    exponent = match["e"] or match["power"] or match["digit"] or "0"
    return Decimal(f"{match['mantissa'].replace(',', '')}e{exponent}")


def _bare(text: str) -> str:
    """Without dollar signs and without a full stop at the end."""
    return text.replace("\\$", "").replace("$", "").strip().rstrip(".").strip()


def _for_latex(text: str) -> str:
    """4.5e33 written out: math-verify takes its e for Euler's number."""
    return _E_NOTATION.sub(r"\1\\times10^{\2}", text)


class _Grader:
    """The worker process and the pipe to it; threads take turns."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew without ending the worker: after a fork it is the parent's."""
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None

    def verify(self, found: str, expected: str, seconds: float) -> bool:
        """Ask the worker. False at the deadline, and where this pair ends the worker in another way, twice."""
        line = json.dumps([found, expected, seconds]) + "\n"
        with self._lock:
            for _ in range(2):  # an idle worker can be killed from outside, and that is nobody's answer
                worker = self._worker = self._worker or _start()
                reply = _ask(worker, line)
                if reply:
                    return reply == "same\n"
                self.close()
                if worker.returncode == -signal.SIGALRM:
                    break
        return False

    def close(self) -> None:
        """End the worker, if there is one, and wait for it."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        assert worker.stdin and worker.stdout
        if worker.poll() is None:
            worker.kill()
        worker.wait()
        worker.stdout.close()
        with suppress(BrokenPipeError):  # a request that it never read
            worker.stdin.close()


def _start() -> subprocess.Popen[str]:
    # -P: next to the worker lies a module called math, which must not hide Python's.
    worker = subprocess.Popen(
        [sys.executable, "-P", str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout
    if worker.stdout.readline() != "ready\n":
        worker.wait()
        raise UserError(
            f"the grading process ended with code {worker.returncode} at its start; "
            "it needs the package math-verify: pip install math-verify"
        )
    return worker


def _ask(worker: subprocess.Popen[str], line: str) -> str:
    """The worker's reply; empty where it has ended."""
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
