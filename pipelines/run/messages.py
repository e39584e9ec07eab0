"""What a user is told of an exception, wherever in the cluster it came from."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import Any

from rcd_core.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded")
# Of an error in an actor Ray Data keeps the text only, as it stands in a traceback.
_IN_TEXT = re.compile(rf"^{UserError.__module__}\.{UserError.__name__}: (.+)$", re.MULTILINE)


def user_message(error: BaseException) -> str | None:
    """The message of the UserError behind an exception, or one about a full disk; None: it is neither."""
    causes = list(_causes(error, set()))
    for cause in causes:
        if isinstance(cause, UserError) and type(cause) is UserError:
            return str(cause)
    for cause in causes:
        if found := _IN_TEXT.search(str(cause)):
            return found[1]
        if is_full_disk(cause):
            lines = [line for line in str(cause).splitlines() if any(text in line for text in _FULL_TEXTS)]
            why = lines[-1].strip() if lines else cause
            return f"no space left for what the run writes ({why}); make room; the same command goes on from here"
    return None


def is_full_disk(error: BaseException) -> bool:
    """Whether this very exception comes from a full disk, if only by its text: wrappers keep no more of another."""
    full = isinstance(error, OSError) and error.errno in _FULL
    return full or any(text in str(error) for text in _FULL_TEXTS)


def _causes(error: Any, seen: set[int]) -> Iterator[BaseException]:
    if not isinstance(error, BaseException) or id(error) in seen:
        return
    seen.add(id(error))
    yield error
    failures = getattr(error, "worker_failures", None)  # Ray Train: rank -> exception
    for inner in (error.__cause__, getattr(error, "cause", None), *(failures or {}).values()):
        yield from _causes(inner, seen)
