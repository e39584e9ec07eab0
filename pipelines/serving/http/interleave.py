"""The events of several decodes in the order in which they come, under one deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from pipelines.serving.backend import DecodeEvent, Finished


class Interleaved:
    """streams: one per choice. limit_s: after so many seconds `next` raises TimeoutError. Close it (aclose): that
    closes every stream, which cancels what it decodes."""

    def __init__(self, streams: Iterable[AsyncIterator[DecodeEvent]], limit_s: float) -> None:
        self.limit_s = limit_s
        self._deadline = time.monotonic() + limit_s
        self._streams = list(streams)
        self._asked = {self._ask(index): index for index in range(len(self._streams))}

    async def next(self, patience_s: float) -> list[tuple[int, DecodeEvent]]:
        """What has come since, with the choice it belongs to; nothing, if nothing comes within patience_s seconds.
        Raises what a stream raises."""
        left = self._deadline - time.monotonic()
        done, _ = await asyncio.wait(
            self._asked, timeout=max(0.0, min(patience_s, left)), return_when=asyncio.FIRST_COMPLETED
        )
        if not done and left <= patience_s:
            raise TimeoutError(f"no whole answer within {self.limit_s:g} s; ask for fewer tokens")
        found: list[tuple[int, DecodeEvent]] = []
        for task in sorted(done, key=self._asked.__getitem__):
            event = task.result()
            if event is None:
                raise RuntimeError("the model's events ended without a result")
            index = self._asked.pop(task)
            found.append((index, event))
            if not isinstance(event, Finished):
                self._asked[self._ask(index)] = index
        return found

    async def aclose(self) -> None:
        # Shielded: whoever closes because it was cancelled may be cancelled again.
        await asyncio.shield(asyncio.ensure_future(self._close()))

    async def _close(self) -> None:
        for task in self._asked:
            task.cancel()
        await asyncio.gather(*self._asked, return_exceptions=True)  # a generator at work cannot be closed
        closing: list[Any] = [s.aclose() for s in self._streams if hasattr(s, "aclose")]
        await asyncio.gather(*closing, return_exceptions=True)

    def _ask(self, index: int) -> asyncio.Task[DecodeEvent | None]:
        return asyncio.ensure_future(_next(self._streams[index]))


async def _next(stream: AsyncIterator[DecodeEvent]) -> DecodeEvent | None:
    return await anext(stream, None)
