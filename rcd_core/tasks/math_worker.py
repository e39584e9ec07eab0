"""The worker process of `math_grader`: compares pairs of answers. A script that imports nothing of rcd_core.

A request is a line of JSON, [answer, expected, seconds]; the reply is the line "same" or "different". At the deadline
the default action of SIGALRM ends the process, even inside C code.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys

MEMORY_BYTES = 4 << 30  # of address space; a tower of powers then raises MemoryError
_SMALL = 1e-3  # below this, six decimals are too few
_RELATIVE = 1e-6


def same(answer: str, expected: str) -> bool:
    """By math-verify; small numbers also by relative difference, because it rounds them to six decimals."""
    from math_verify import parse, verify

    # No timeouts of its own: they need SIGALRM, which is our deadline.
    gold, target = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (expected, answer))
    return bool(verify(gold, target, timeout_seconds=None)) and not _small_and_different(gold, target)


def _small_and_different(gold: list[object], target: list[object]) -> bool:
    try:
        x, y = (float(parsed[0].doit()) for parsed in (gold, target))  # type: ignore[attr-defined]
    except (AttributeError, IndexError, TypeError, ValueError, OverflowError):
        return False  # not a real number
    largest = max(abs(x), abs(y))
    return largest < _SMALL and abs(x - y) > _RELATIVE * largest


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; its exit ends this process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the parser's generated code prints to stdout
    import math_verify  # noqa: F401  # takes seconds, which should not count towards a deadline

    logging.disable(logging.CRITICAL)  # it logs every text that it cannot parse
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        answer, expected, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            verdict = same(answer, expected)
        except Exception:  # sympy raises anything; what cannot be compared is different
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("same" if verdict else "different", file=replies, flush=True)


if __name__ == "__main__":
    main()
