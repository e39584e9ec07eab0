"""The events of several decodes in order of arrival, under one deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from pipelines.serving.backend import DecodeEvent, Finished


class Interleaved:
    """streams: one per choice. limit_s: seconds after which `next` raises TimeoutError. `aclose` closes every stream,
    which cancels its decode."""

    def __init__(self, streams: Iterable[AsyncIterator[DecodeEvent]], limit_s: float) -> None:
        self.limit_s = limit_s
        self._deadline = time.monotonic() + limit_s
        self._streams = list(streams)
        self._pending = {self._start_next(index): index for index in range(len(self._streams))}

    async def next(self, patience_s: float) -> list[tuple[int, DecodeEvent]]:
        """New events, each with its choice; empty if there is none within patience_s seconds. Raises what a stream
        raises."""
        left = self._deadline - time.monotonic()
        done, _ = await asyncio.wait(
            self._pending, timeout=max(0.0, min(patience_s, left)), return_when=asyncio.FIRST_COMPLETED
        )
        if not done and left <= patience_s:
            raise TimeoutError(f"no complete answer within {self.limit_s:g} s; request fewer tokens")
        events: list[tuple[int, DecodeEvent]] = []
        for task in sorted(done, key=self._pending.__getitem__):
            event = task.result()
            if event is None:
                raise RuntimeError("the model's events ended without a result")
            index = self._pending.pop(task)
            events.append((index, event))
            if not isinstance(event, Finished):
                self._pending[self._start_next(index)] = index
        return events

    async def aclose(self) -> None:
        # Shielded: a caller that closes because it was cancelled may be cancelled again.
        await asyncio.shield(asyncio.ensure_future(self._close()))

    async def _close(self) -> None:
        for task in self._pending:
            task.cancel()
        await asyncio.gather(*self._pending, return_exceptions=True)  # a running generator cannot be closed
        closing: list[Any] = [s.aclose() for s in self._streams if hasattr(s, "aclose")]
        await asyncio.gather(*closing, return_exceptions=True)

    def _start_next(self, index: int) -> asyncio.Task[DecodeEvent | None]:
        return asyncio.ensure_future(_next(self._streams[index]))


async def _next(stream: AsyncIterator[DecodeEvent]) -> DecodeEvent | None:
    return await anext(stream, None)
