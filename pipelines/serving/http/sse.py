"""Server-sent events: framing of chunks, and cancellation when the client disconnects.

data: {...}      a chunk; `data: {"error": {...}}` ends a failed stream
: ping           a comment, sent during silence
data: [DONE]     the end of a complete stream
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pipelines.serving.backend import DecodeEvent
from pipelines.serving.http.answers import Answer
from pipelines.serving.http.interleave import Interleaved

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


def frame(chunk: Mapping[str, Any]) -> bytes:
    # ASCII, because some clients break lines at Unicode line separators.
    return b"data: " + json.dumps(chunk, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n\n"


async def frames(
    answer: Answer,
    streams: Interleaved,
    first: Iterable[tuple[int, DecodeEvent]],
    failed: Callable[[Exception], dict[str, Any]],
    ping_s: float,
) -> AsyncGenerator[bytes, None]:
    """The frames of an answer. first: events received already. failed: exception -> error body. ping_s: silence after
    which to send a comment."""
    try:
        yield b"".join(map(frame, answer.opening()))
        events = list(first)
        while True:
            yield b"".join(frame(c) for index, event in events for c in answer.add(index, event)) if events else PING
            if answer.complete:
                break
            events = await streams.next(ping_s)
        yield b"".join(map(frame, answer.closing())) + DONE
    except Exception as error:
        yield frame(failed(error))


class EventStream(Response):
    """Sends frames as they come, and stops at once when the client disconnects, or after limit_s seconds in which a
    client that does not read holds them up. closing: closed at the end in every case."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncGenerator[bytes, None], closing: AsyncExitStack, limit_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})  # proxies must not buffer
        del self.headers["content-length"]
        self._content, self._closing, self._limit_s = content, closing, limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._closing:
            with suppress(ClientGone, TimeoutError):
                async with asyncio.timeout(self._limit_s):
                    await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._content) as content:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for part in content:
                if part:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class ClientGone(Exception):
    """The client has disconnected."""


async def while_connected(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client disconnects first, cancels it and raises ClientGone.

    receive: of a request whose body has been read.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
