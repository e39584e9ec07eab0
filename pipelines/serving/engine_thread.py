"""An engine in a thread of its own, asked from an event loop; free of Ray and of HTTP.

Requests join, are cancelled and are told of between two passes. Texts are made in the event loop, so that the thread
does nothing but passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from pipelines.serving.backend import DecodeEvent, DecodeRequest, Overloaded
from pipelines.serving.request_text import Answer, RequestText
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.reference import AsyncReference, Reference
from rcd_core.decoding.sequence import Sequence
from rcd_core.decoding.stream import Event, Progress
from rcd_core.families.base import DiffusionModel

MAX_FAILURES = 3  # failed steps in a row after which the thread gives up: what is wrong is no single request
_KINDS = ("prefill", "denoise", "store", "reference")


class EngineFailed(RuntimeError):
    """A pass failed; the requests that took part are lost."""


class EngineGone(EngineFailed):
    """The engine has given up before it took the request: another one can."""


@dataclass(frozen=True)
class Batch:
    """Events that became known after one pass. forwards: passes of the request so far, by kind. anew: the request came
    with committed tokens that could not be used, so its passes are all there are."""

    events: list[DecodeEvent]
    forwards: dict[str, int]
    anew: bool = False


@dataclass(frozen=True)
class _News:
    events: list[Event]
    forwards: dict[str, int]


@dataclass(eq=False)
class _Client:
    """A request and the event loop that waits for its news."""

    sequence: Sequence
    loop: asyncio.AbstractEventLoop
    inbox: asyncio.Queue[_News | EngineFailed] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self._progress = Progress(self.sequence)
        self._seen = (0, 0, False)
        self.begun = time.monotonic()
        self.admitted = False  # it has a place in the batch

    def news(self) -> _News | None:
        """What is new since the last look."""
        s = self.sequence
        now = (s.block_index, len(s.steps), s.finished)  # whatever is told comes with a change of these
        if now == self._seen:
            return None
        self._seen = now
        return _News(list(self._progress.new_events()), vars(s.forwards).copy())


_Letters = list[tuple[_Client, _News | EngineFailed]]


def _send(letters: _Letters) -> None:
    """From the engine's thread to those who wait. One call for all of an event loop: each wakes it up, and it takes its
    time from the engine's."""
    for loop in {client.loop for client, _ in letters}:
        mine = [(client, news) for client, news in letters if client.loop is loop]
        with contextlib.suppress(RuntimeError):  # it is closed: nobody listens
            loop.call_soon_threadsafe(_put, mine)


def _put(letters: _Letters) -> None:
    for client, news in letters:
        client.inbox.put_nowait(news)


class EngineThread:
    """A Backend of the HTTP interface. max_batch: requests under way at once; max_queue: requests that may wait beyond
    these; max_length: positions of a request, prompt and answer.

    One event loop at a time may use it. The thread is a daemon; `close` ends it.
    """

    def __init__(
        self,
        model: DiffusionModel,
        tokenizer: Any,
        reference: Reference | AsyncReference | None,
        *,
        max_batch: int,
        max_length: int,
        max_queue: int,
    ) -> None:
        self.model, self.tokenizer, self.reference = model, tokenizer, reference
        self.max_batch, self.max_length, self.max_queue = max_batch, max_length, max_queue
        self.text = RequestText(model, tokenizer, has_reference=reference is not None, max_length=max_length)
        self.failure: BaseException | None = None
        self._engine = self._new_engine()
        self._past: dict[str, float] = {}  # counters of engines that failed
        self._clients: dict[Sequence, _Client] = {}
        self._orders: queue.SimpleQueue[tuple[str, _Client | None]] = queue.SimpleQueue()
        self._answered: Counter[str] = Counter()
        self._waits = (0, 0.0)  # requests that got a place, seconds until they did
        self._mean_seconds = 1.0  # that a request takes, the last ones counting most
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- for the event loop
    async def stream(self, request: DecodeRequest) -> AsyncGenerator[DecodeEvent, None]:
        """Raises UserError or Overloaded on the first step, EngineFailed later. Closing it cancels the request."""
        async with contextlib.aclosing(self.batches(request)) as batches:
            async for batch in batches:
                for event in batch.events:
                    yield event

    async def batches(self, request: DecodeRequest) -> AsyncGenerator[Batch, None]:
        """`stream` with what one pass brought in one piece."""
        self.check()
        client = _Client(self.text.sequence(request), asyncio.get_running_loop())
        if len(self._clients) >= self.max_batch + self.max_queue:
            raise Overloaded(self._seconds_to_a_place())
        answer = Answer(self.tokenizer, request, client.sequence)
        anew = bool(request.committed) and client.sequence.block[0] <= client.sequence.num_prompt
        self._clients[client.sequence] = client
        self._orders.put(("add", client))
        try:
            self.check()  # again: had it given up meanwhile, it would not know of this request
            while not answer.finished:
                news = await client.inbox.get()
                if isinstance(news, EngineFailed):
                    self._answered["failed"] += 1
                    raise news
                events = answer.events(news.events, news.forwards)
                if answer.finished:
                    self._count(answer, news.forwards, time.monotonic() - client.begun)
                if events:
                    yield Batch(events, news.forwards, anew)
        finally:
            if self._clients.pop(client.sequence, None) is not None:
                self._orders.put(("cancel", client))
                self._answered["cancelled"] += not answer.finished  # the others met a stop string

    async def ready(self) -> None:
        """Returns at once; EngineGone where the thread has given up."""
        self.check()

    def check(self) -> None:
        if self.failure is not None:
            raise EngineGone(f"the engine has given up: {self.failure!r}") from self.failure

    async def statistics(self) -> dict[str, float]:
        """Counters since the start, whose names end in _total, and gauges. Of answered requests: requests, tokens, and
        forwards, which are passes of one request; of batched passes: their number and seconds ("choose": head and
        reduction). admitted, queue_seconds: requests that got a place in the batch, and how long they waited for it."""
        found = self._passes()
        for name, value in self._past.items():
            found[name] += value
        answered = ("requests", "tokens", "cancelled", "failed", "reference_failures")
        for name in (*answered, *(f"{kind}_forwards" for kind in _KINDS)):
            found[f"{name}_total"] = float(self._answered[name])
        found["admitted_total"], found["queue_seconds_total"] = map(float, self._waits)
        found["running"] = float(len(self._engine.running))
        found["queue_length"] = float(max(0, len(self._clients) - len(self._engine.running)))
        return found

    def close(self) -> None:
        self._orders.put(("close", None))
        self._thread.join()

    def _seconds_to_a_place(self) -> float:
        return float(min(60, max(1, round(self._mean_seconds / self.max_batch))))

    def _count(self, answer: Answer, forwards: dict[str, int], seconds: float) -> None:
        found = {f"{kind}_forwards": count for kind, count in forwards.items()}
        found |= {"requests": 1, "tokens": answer.num_tokens, "reference_failures": answer.sequence.reference_failures}
        self._answered.update(found)
        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)

    def _passes(self) -> dict[str, float]:
        s = self._engine.statistics
        found: dict[str, float] = {f"{kind}_passes": s.passes.get(kind, 0) for kind in _KINDS}
        found |= {f"{kind}_seconds": s.seconds.get(kind, 0.0) for kind in (*_KINDS, "choose")}
        found |= {"reused_tokens": s.reused_tokens, "reused_prefills": s.reused_prefills}
        found["merged_stores"] = s.merged_stores
        return {f"{name}_total": float(value) for name, value in found.items()}

    # -- the thread
    def _run(self) -> None:
        failures = 0
        while self.failure is None and self._take_orders():
            begun = time.monotonic()
            try:
                done = self._engine.step()
                failures = 0
            except Exception as error:  # whatever it is, those who wait must hear of it
                failures += 1
                self._start_again(error, failures)
                continue
            letters: _Letters = []
            for s in [*self._engine.running, *done]:
                if (client := self._clients.get(s)) is not None:
                    if not client.admitted:
                        client.admitted = True
                        self._waits = (self._waits[0] + 1, self._waits[1] + begun - client.begun)
                    if (news := client.news()) is not None:
                        letters.append((client, news))
                if s.finished:
                    self._clients.pop(s, None)
                elif s.forwards.denoise > len(s.canvas) + 2 * len(s.blocks):
                    # A pass commits a token at least, but for a start and an end of each block.
                    self._engine.cancel(s)
                    self._lose([s], ArithmeticError("predictions are not finite, so that no token is ever sure"))
            _send(letters)

    def _take_orders(self) -> bool:
        """What has come in since the last pass; waits where there is nothing else to do. False: the end."""
        while True:
            try:
                order, client = self._orders.get(block=not self._engine.busy)
            except queue.Empty:
                return True
            if client is None:
                return False
            if order == "add":
                self._engine.add(client.sequence)
            else:
                self._engine.cancel(client.sequence)

    def _new_engine(self) -> Engine:
        return Engine(
            self.model, self.reference, max_batch=self.max_batch, max_length=self.max_length, reuse_prefixes=True
        )

    def _start_again(self, error: Exception, failures: int) -> None:
        """Those under way are lost, their caches may be anything; those that wait go on with a new engine."""
        old = self._engine
        lost = [*old.running]
        try:
            if failures == MAX_FAILURES:
                raise error
            new = self._new_engine()
            for s in old.waiting:
                new.add(s)
            self._past = {name: value + self._past.get(name, 0.0) for name, value in self._passes().items()}
            self._engine = new
        except Exception as last:
            self.failure = last
            lost = list(self._clients)
        self._lose(lost, error)

    def _lose(self, sequences: list[Sequence], error: Exception) -> None:
        for s in sequences:
            if (client := self._clients.pop(s, None)) is not None:
                failed = EngineFailed(f"a pass failed: {type(error).__name__}: {error}")
                failed.__cause__ = error
                _send([(client, failed)])
