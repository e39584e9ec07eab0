"""Stops a job quickly and leaves its run resumable: on SIGTERM (`ray job stop`), Ctrl-C or a lost lease.

Ray kills a job three seconds after SIGTERM. The main thread gets SystemExit. After a short grace period a watcher
thread runs the clean-up and ends the process, even if the main thread hangs. The C signal handler wakes that thread
through a socket, which also works while the main thread is in C++ code.
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

    A context manager, which at its end restores the signal handlers, or completes a stop in progress.
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
        if self.code is not None:  # stopping: do not spend seconds on the interpreter's shutdown
            self._end()
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._writer.close()

    def install(self) -> None:
        """Set the signal handlers, also after a library (Ray Train) has replaced them."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def stop(self, reason: str, code: int) -> None:
        """Stop from any thread."""
        self._announce(reason, code)
        os.kill(os.getpid(), signal.SIGTERM)

    def _announce(self, reason: str, code: int) -> None:
        if self.code is None:
            self.code = code
            # os.write, because print may need a lock that the interrupted code holds.
            os.write(2, f"\n{reason}\n".encode())

    def _on_signal(self, number: int, frame: FrameType | None = None) -> None:
        self._announce(f"stopped by {signal.Signals(number).name}; run the same command again to resume", 128 + number)
        raise SystemExit(self.code)

    def _watch(self) -> None:
        signals: list[int] = []
        while not signals:
            received = self._reader.recv(64)
            if not received:  # closed: the job has ended
                self._reader.close()
                return
            signals = [number for number in received if number in _SIGNALS]
        time.sleep(GRACE_S)
        with suppress(SystemExit):
            self._on_signal(signals[0])  # the main thread may not have handled it
        self._end()

    def _end(self) -> NoReturn:
        with suppress(Exception):
            self.cleanup()
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(self.code or 143)
