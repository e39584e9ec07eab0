"""Patience with storage that does not answer for a while.

Object stores: their clients repeat a request after throttling, server errors, timeouts and lost sockets
(object_stores.py). In the processes of a job, which call be_patient(), for half an hour; elsewhere for seconds, so that
a wrong endpoint is soon reported.

File systems: `patiently` repeats calls after stale handles, timeouts and lost connections of a network file system.
"""

from __future__ import annotations

import errno
import functools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
PATIENCE_S = 1800.0
LONGEST_PAUSE_S = 30.0
_NETWORK = (errno.ESTALE, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET)
_job = threading.Event()
_thread = threading.local()
logger = logging.getLogger(__name__)


def be_patient() -> None:
    """From now on this process waits up to half an hour for an object store."""
    _job.set()


@contextmanager
def hasty() -> Iterator[None]:
    """Within this block and thread an object store gets seconds."""
    _thread.hasty = True
    try:
        yield
    finally:
        _thread.hasty = False


def is_patient() -> bool:
    return _job.is_set() and not getattr(_thread, "hasty", False)


def may_pass(error: BaseException) -> bool:
    """Whether a file system that raises this may answer later."""
    return isinstance(error, TimeoutError | ConnectionError) or getattr(error, "errno", None) in _NETWORK


def patiently(function: Callable[P, T]) -> Callable[P, T]:
    """The function, repeated after errors that may pass: for PATIENCE_S, with random and growing pauses."""

    @functools.wraps(function)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> T:
        started, pause = time.monotonic(), 0.1
        while True:
            try:
                return function(*args, **kwargs)
            except OSError as error:
                if not may_pass(error) or time.monotonic() - started > PATIENCE_S:
                    raise
                logger.warning("%s; trying again", error)
            time.sleep(random.uniform(pause / 2, pause))
            pause = min(2 * pause, LONGEST_PAUSE_S)

    return repeated
