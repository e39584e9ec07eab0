"""The message for the user in an exception, wherever in the cluster it was raised."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from rcd_core.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded")
# Ray Data keeps only the traceback's text of an error in an actor.
_IN_TEXT = re.compile(rf"^{UserError.__module__}\.{UserError.__name__}: (.+)$", re.MULTILINE)
_RETRIES = "\nFailed to apply UDF transform"  # to the message of an error in a task, Ray Data adds its settings


def user_message(error: BaseException) -> str | None:
    """The message of the UserError behind an exception, or one about a full disk; None for other errors."""
    chain = list(causes(error))
    for cause in chain:
        if isinstance(cause, UserError) and type(cause) is UserError:
            return str(cause).partition(_RETRIES)[0]
    for cause in chain:
        if match := _IN_TEXT.search(str(cause)):
            return match[1]
        if is_full_disk(cause):
            lines = [line for line in str(cause).splitlines() if any(text in line for text in _FULL_TEXTS)]
            why = lines[-1].strip() if lines else cause
            return f"no space left for the files of the run ({why}); make room and run the same command again"
    return None


def is_full_disk(error: BaseException) -> bool:
    """Whether this exception, not its causes, comes from a full disk. Wrappers often keep only the text."""
    full = isinstance(error, OSError) and error.errno in _FULL
    return full or any(text in str(error) for text in _FULL_TEXTS)


def causes(error: BaseException, *, contexts: bool = False) -> Iterator[BaseException]:
    """An exception and those behind it, each once. Ray and torch keep some in attributes of their own.

    contexts: also exceptions that were being handled when another was raised (`__context__`).
    """
    queue: list[Any] = [error]
    seen: set[int] = set()
    while queue:
        current = queue.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        names = ("__cause__", "cause", "controller_failure", "health_check_failure")  # the last two: Ray Train
        queue += [getattr(current, name, None) for name in names]
        if contexts:
            queue.append(current.__context__)
        queue += (getattr(current, "worker_failures", None) or {}).values()  # Ray Train: rank -> exception
        # torch.distributed.checkpoint: rank -> (exception, traceback)
        failures = (getattr(current, "failures", None) or {}).values()
        queue += [failure[0] if isinstance(failure, tuple) else failure for failure in failures]


def make_console() -> Console:
    """A console that wraps at 120 columns when stdout is not a terminal, which is the case in a job's log."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
    return Console(highlight=False, width=width)
