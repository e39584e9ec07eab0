"""One engine that several threads feed: requests of one piece of work join the batch while those of others leave it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence

from rcd_core.decoding.engine import Engine
from rcd_core.decoding.sequence import Sequence as Request

_Done = queue.SimpleQueue["tuple[Request, float] | BaseException"]  # of one caller


class SharedEngine:
    """Runs an engine in a thread of its own. A pass that raises ends it, with the same exception for every caller:
    `failure`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._new: queue.SimpleQueue[tuple[Request, _Done] | None] = queue.SimpleQueue()
        self._callers: dict[Request, _Done] = {}
        self._seconds: dict[Request, float] = {}
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def finished(self, requests: Sequence[Request]) -> Iterator[tuple[Request, float]]:
        """Decode requests. Yields each when it is finished, with its share of the engine's time in seconds: that of a
        pass is shared equally by the requests in it."""
        done: _Done = queue.SimpleQueue()
        for request in requests:
            self._new.put((request, done))
        for _ in requests:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result

    def close(self) -> None:
        """End the thread and free the engine. No caller may be waiting."""
        self._new.put(None)
        self._thread.join()
        del self._engine

    def _run(self) -> None:
        while True:
            try:
                if not self._take():
                    return
                started = time.perf_counter()
                done = self._engine.step()
            except BaseException as error:  # of any kind: callers are waiting
                self.failure = error
                for caller in self._callers.values():
                    caller.put(error)
                self._callers.clear()
                continue
            together = [*self._engine.running, *done]
            share = (time.perf_counter() - started) / max(1, len(together))
            for request in together:
                self._seconds[request] = self._seconds.get(request, 0.0) + share
            for request in done:
                self._callers.pop(request).put((request, self._seconds.pop(request)))

    def _take(self) -> bool:
        """Take in new requests; wait for some while there is nothing to do. False: the thread must end."""
        while True:
            try:
                new = self._new.get(block=self.failure is not None or not self._engine.busy)
            except queue.Empty:
                return True
            if new is None:
                return False
            request, caller = new
            if self.failure is not None:
                caller.put(self.failure)
                continue
            self._callers[request] = caller
            self._engine.add(request)
