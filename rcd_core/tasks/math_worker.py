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
_EXACT = 1e-20
_DIGITS = 40


def same(answer: str, expected: str) -> bool:
    """By math-verify, and for numbers also exactly: math-verify rounds to six decimals."""
    from latex2sympy2_extended import NormalizationConfig  # type: ignore[import-untyped]
    from math_verify import LatexExtractionConfig, parse, verify

    # Units are the caller's: this parser drops them, and takes variables for units.
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    config = [LatexExtractionConfig(normalization_config=rules)]
    # No timeouts of its own: they need SIGALRM, which is our deadline.
    gold, target = (parse(f"\\boxed{{{text}}}", config, parsing_timeout=None) for text in (expected, answer))
    equal = bool(verify(gold, target, timeout_seconds=None, allow_set_relation_comp=True))
    return equal and not _different_numbers(gold, target)


def _different_numbers(gold: list[object], target: list[object]) -> bool:
    """Whether both are numbers and differ: at all if both are exact, else relatively if they are small."""
    from sympy import Expr, Float  # type: ignore[import-untyped]

    try:
        x, y = (parsed[0].doit() for parsed in (gold, target))  # type: ignore[attr-defined]
    except (AttributeError, IndexError, TypeError, ValueError):
        return False
    if not (isinstance(x, Expr) and isinstance(y, Expr)) or x.free_symbols or y.free_symbols:
        return False
    if x.is_finite is False or y.is_finite is False:
        return False
    exact = not x.has(Float) and not y.has(Float)
    if exact and x.is_Rational and y.is_Rational:
        return bool(x != y)
    largest = max(abs(x).evalf(_DIGITS), abs(y).evalf(_DIGITS))
    difference = abs(x - y).evalf(_DIGITS)
    if exact:
        return bool(difference > _EXACT * largest)
    return bool(largest < _SMALL and difference > _RELATIVE * largest)


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
