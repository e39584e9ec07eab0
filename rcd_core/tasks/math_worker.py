"""The process behind `math_grader`: reads pairs of answers, writes whether they are the same. Run as a script.

A request is a line of JSON, [found, expected, seconds]; the reply is the line "same" or "different". At the deadline
the alarm's default action ends the process, in whatever C code it is. It imports nothing of this project.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys

MEMORY_BYTES = 4 << 30  # of address space: a tower of powers ends in MemoryError
_SMALL = 1e-3  # below this, six decimals say too little
_RELATIVE = 1e-6


def same(found: str, expected: str) -> bool:
    """By math-verify, and tiny numbers by their ratio, which it rounds to six decimals and so takes for equal."""
    from math_verify import parse, verify

    # Its timeouts need the signal that is our deadline.
    gold, target = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (expected, found))
    return bool(verify(gold, target, timeout_seconds=None)) and not _tiny_and_unlike(gold, target)


def _tiny_and_unlike(gold: list[object], target: list[object]) -> bool:
    try:
        x, y = (float(parsed[0].doit()) for parsed in (gold, target))  # type: ignore[attr-defined]
    except (AttributeError, IndexError, TypeError, ValueError, OverflowError):
        return False  # no real number
    largest = max(abs(x), abs(y))
    return largest < _SMALL and abs(x - y) > _RELATIVE * largest


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end ends this
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the parser's generated code prints
    import math_verify  # noqa: F401  # seconds, which no deadline should count

    logging.disable(logging.CRITICAL)  # every text it cannot read is logged
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        found, expected, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            verdict = same(found, expected)
        except Exception:  # sympy raises of every kind; what cannot be compared is not the same
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("same" if verdict else "different", file=replies, flush=True)


if __name__ == "__main__":
    main()
