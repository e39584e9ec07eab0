"""A stop that is quick and leaves the run resumable: SIGTERM (`ray job stop`), Ctrl-C, or a lost lease.

Ray kills a job three seconds after SIGTERM. So the main thread is unwound by SystemExit if it can be, and after a
short grace, whatever it hangs in, a watching thread runs the clean-up and ends the process. That thread is woken
through a socket by the C signal handler, which works even while the main thread sits in a library's C++ code.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

GRACE_S = 1.5
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopper:
    """Ends this process on a signal or on stop(). `cleanup` must be short and safe to call twice.

    A context manager: at its end the signals are given back, or the stop under way is completed.
    """

    def __init__(self, cleanup: Callable[[], None]) -> None:
        self.cleanup = cleanup
        self.code: int | None = None  # exit code once stopping, else None
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}

    def __enter__(self) -> Stopper:
        self.install()
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stopper", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.code is not None:  # unwound: do not spend seconds on taking the interpreter's libraries down
            self._end()
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._writer.close()

    def install(self) -> None:
        """Take the signals, or take them back from what sets handlers of its own (Ray Train does)."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def stop(self, reason: str, code: int) -> None:
        """Stop from any thread."""
        self._announce(reason, code)
        os.kill(os.getpid(), signal.SIGTERM)

    def _announce(self, reason: str, code: int) -> None:
        if self.code is None:
            self.code = code
            # Not print: it may need a lock that the interrupted code holds.
            os.write(2, f"\n{reason}\n".encode())

    def _on_signal(self, number: int, frame: FrameType | None = None) -> None:
        self._announce(f"stopped by {signal.Signals(number).name}; the same command goes on from here", 128 + number)
        raise SystemExit(self.code)

    def _watch(self) -> None:
        caught: list[int] = []
        while not caught:
            received = self._reader.recv(64)
            if not received:  # closed: the job ended by itself
                self._reader.close()
                return
            caught = [number for number in received if number in _SIGNALS]
        time.sleep(GRACE_S)
        with suppress(SystemExit):
            self._on_signal(caught[0])  # the main thread may never have come to it
        self._end()

    def _end(self) -> NoReturn:
        with suppress(Exception):
            self.cleanup()
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(self.code or 143)
