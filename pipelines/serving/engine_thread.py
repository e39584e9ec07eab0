"""An engine in its own thread, used from an event loop. Needs neither Ray nor HTTP.

Requests join the batch, are cancelled and send their events between two passes. Prompts are tokenized in a thread of
their own. Text is decoded in the event loop, so that the engine's thread only runs passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipelines.serving.backend import DecodeEvent, DecodeRequest, Overloaded
from pipelines.serving.request_text import AnswerText, RequestText
from rcd_core.decoding.engine import Engine
from rcd_core.decoding.reference import AsyncReference, LocalReference, Reference
from rcd_core.decoding.sequence import Sequence
from rcd_core.decoding.stream import Event, Progress
from rcd_core.decoding.tensor_parallel import make_engine
from rcd_core.evaluation.flops import shape_of
from rcd_core.families.base import DiffusionModel
from rcd_core.training.plan import ModelShape

MAX_FAILURES = 3  # failed steps in a row after which the thread gives up: the cause is not a single request
RECENT_PROMPTS = 16  # whose token ids are kept, because the choices of a prompt arrive one by one
_KINDS = ("prefill", "denoise", "store", "reference")


class EngineFailed(RuntimeError):
    """A pass failed; the requests in its batch are lost."""


class EngineGone(EngineFailed):
    """The engine gave up before it accepted the request; another replica can serve it."""


@dataclass(frozen=True)
class EventBatch:
    """Events of one request after one pass. forwards: its passes so far, by kind. restarted: the request came with
    committed tokens that could not be reused, so forwards are all of its passes."""

    events: list[DecodeEvent]
    forwards: dict[str, int]
    restarted: bool = False


@dataclass(frozen=True)
class _Update:
    events: list[Event]
    forwards: dict[str, int]


@dataclass(eq=False)
class _Client:
    """A request and the event loop that waits for its updates."""

    sequence: Sequence
    loop: asyncio.AbstractEventLoop
    inbox: asyncio.Queue[_Update | EngineFailed] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self._progress = Progress(self.sequence)
        self._state = (0, 0, False)
        self.started = time.monotonic()
        self.admitted = False  # it has a slot in the batch

    def update(self) -> _Update | None:
        """What changed since the last call."""
        s = self.sequence
        state = (s.block_index, len(s.steps), s.finished)  # every event comes with a change of these
        if state == self._state:
            return None
        self._state = state
        return _Update(list(self._progress.new_events()), vars(s.forwards).copy())


_Updates = list[tuple[_Client, _Update | EngineFailed]]


def shape_of_reference(reference: Reference | AsyncReference | None) -> ModelShape | None:
    """The size of a reference; None: another process has it, and has not said it yet."""
    if isinstance(reference, LocalReference):
        return shape_of(reference.model)
    return getattr(reference, "shape", None)


def _send(updates: _Updates) -> None:
    """From the engine's thread to the event loops. One call per loop, because each call wakes the loop up and takes
    time from the engine."""
    for loop in {client.loop for client, _ in updates}:
        of_loop = [(client, update) for client, update in updates if client.loop is loop]
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(_put, of_loop)


def _put(updates: _Updates) -> None:
    for client, update in updates:
        client.inbox.put_nowait(update)


class EngineThread:
    """A Backend in this process.

    max_batch: requests decoded at once. max_queue: requests that may wait. max_length: positions of a request, prompt
    and answer. num_pages: as of Engine. One event loop at a time may use it. The thread is a daemon; `close` ends it.
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
        num_pages: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.reference = model, tokenizer, reference
        self.max_batch, self.max_length, self.max_queue = max_batch, max_length, max_queue
        self.num_pages = num_pages
        self.text = RequestText(model, tokenizer, has_reference=reference is not None, max_length=max_length)
        self.failure: BaseException | None = None
        self._engine = self._new_engine()
        self._failed_engines: dict[str, float] = {}  # their counters
        self._clients: dict[Sequence, _Client] = {}
        self._commands: queue.SimpleQueue[tuple[str, _Client | None]] = queue.SimpleQueue()
        self._num_tokenizing = 0
        self._recent_ids: dict[Hashable, asyncio.Future[list[int]]] = {}  # by prompt, the latest one last
        # One thread, because a tokenizer must not be configured by two at once.
        self._tokenizer_thread = ThreadPoolExecutor(1, "tokenizer")
        self._counts: Counter[str] = Counter()
        self._num_admitted, self._queue_seconds = 0, 0.0
        self._mean_seconds = 1.0  # of a request; moving average
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- for the event loop
    async def stream(self, request: DecodeRequest) -> AsyncGenerator[DecodeEvent, None]:
        """Raises UserError or Overloaded on the first step, EngineFailed later. Closing it cancels the request."""
        async with contextlib.aclosing(self.batches(request)) as batches:
            async for batch in batches:
                for event in batch.events:
                    yield event

    async def batches(self, request: DecodeRequest) -> AsyncGenerator[EventBatch, None]:
        """Like `stream`, with the events of one pass together."""
        self.check()
        self.text.check_size(request)
        if len(self._clients) + self._num_tokenizing >= self.max_batch + self.max_queue:
            raise Overloaded(self._retry_after_s())
        self._num_tokenizing += 1  # its place in the queue
        try:
            ids = await self._token_ids(request)
        finally:
            self._num_tokenizing -= 1
        client = _Client(self.text.sequence(request, ids), asyncio.get_running_loop())
        answer = AnswerText(self.tokenizer, request, client.sequence, lambda: shape_of_reference(self.reference))
        restarted = bool(request.committed) and client.sequence.block[0] <= client.sequence.num_prompt
        self._clients[client.sequence] = client
        self._commands.put(("add", client))
        try:
            self.check()  # again: a thread that has just given up would never answer this request
            while not answer.finished:
                update = await client.inbox.get()
                if isinstance(update, EngineFailed):
                    self._counts["failed"] += 1
                    raise update
                events = answer.events(update.events, update.forwards)
                if answer.finished:
                    self._count(answer, update.forwards, time.monotonic() - client.started)
                if events:
                    yield EventBatch(events, update.forwards, restarted)
        finally:
            if self._clients.pop(client.sequence, None) is not None:
                self._commands.put(("cancel", client))
                self._counts["cancelled"] += not answer.finished  # a stop string is no cancellation

    async def _token_ids(self, request: DecodeRequest) -> list[int]:
        """The request's token ids. A text is tokenized in a thread, once for all choices of a prompt."""
        if isinstance(request.prompt, list):
            return self.text.token_ids(request)
        key = (request.prompt, request.infill, *((m["role"], m["content"]) for m in request.messages or ()))
        shared, loop = self._recent_ids.pop(key, None), asyncio.get_running_loop()
        if shared is None or shared.get_loop() is not loop or (shared.done() and shared.exception()):
            shared = loop.run_in_executor(self._tokenizer_thread, self.text.token_ids, request)
        self._recent_ids[key] = shared
        if len(self._recent_ids) > RECENT_PROMPTS:
            del self._recent_ids[next(iter(self._recent_ids))]
        return await asyncio.shield(shared)  # a choice that is cancelled leaves the others their ids

    async def ready(self) -> None:
        """Return at once; raise EngineGone if the thread has given up."""
        self.check()

    def check(self) -> None:
        if self.failure is not None:
            raise EngineGone(f"the engine gave up: {self.failure!r}") from self.failure

    async def statistics(self) -> dict[str, float]:
        """Counters since the start (names in _total) and gauges; serving/metrics.py describes each."""
        values = self._pass_counts()
        for name, value in self._failed_engines.items():
            values[name] += value
        answered = ("requests", "tokens", "cancelled", "failed", "reference_failures")
        for name in (*answered, *(f"{kind}_forwards" for kind in _KINDS)):
            values[f"{name}_total"] = float(self._counts[name])
        values["admitted_total"], values["queue_seconds_total"] = float(self._num_admitted), self._queue_seconds
        values["running"] = float(len(self._engine.running))
        values["queue_length"] = float(max(0, len(self._clients) - len(self._engine.running)) + self._num_tokenizing)
        return values

    def close(self) -> None:
        self._tokenizer_thread.shutdown(wait=False, cancel_futures=True)
        self._commands.put(("close", None))
        self._thread.join()

    def _retry_after_s(self) -> float:
        return float(min(60, max(1, round(self._mean_seconds / self.max_batch))))

    def _count(self, answer: AnswerText, forwards: dict[str, int], seconds: float) -> None:
        self._counts.update({f"{kind}_forwards": count for kind, count in forwards.items()})
        failures = answer.sequence.reference_failures
        self._counts.update(requests=1, tokens=answer.num_tokens, reference_failures=failures)
        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)

    def _pass_counts(self) -> dict[str, float]:
        s = self._engine.statistics
        counts: dict[str, float] = {f"{kind}_passes": s.passes.get(kind, 0) for kind in _KINDS}
        counts |= {f"{kind}_seconds": s.seconds.get(kind, 0.0) for kind in (*_KINDS, "choose")}
        counts |= {"reused_tokens": s.reused_tokens, "reused_prefills": s.reused_prefills}
        counts["merged_stores"] = s.merged_stores
        return {f"{name}_total": float(value) for name, value in counts.items()}

    # -- the thread
    def _run(self) -> None:
        failures = 0
        while self.failure is None and self._process_commands():
            started = time.monotonic()
            try:
                done = self._engine.step()
                failures = 0
            except Exception as error:  # of any kind: clients are waiting
                failures += 1
                self._restart(error, failures)
                continue
            updates: _Updates = []
            for s in [*self._engine.running, *done]:
                if s.error is not None:
                    self._fail([s], ArithmeticError(s.error))
                elif (client := self._clients.get(s)) is not None:
                    if not client.admitted:
                        client.admitted = True
                        self._num_admitted += 1
                        self._queue_seconds += started - client.started
                    if (update := client.update()) is not None:
                        updates.append((client, update))
                if s.finished:
                    self._clients.pop(s, None)
            _send(updates)

    def _process_commands(self) -> bool:
        """Process the commands since the last pass; block while the engine is idle. False: the thread must end."""
        while True:
            try:
                command, client = self._commands.get(block=not self._engine.busy)
            except queue.Empty:
                return True
            if client is None:
                return False
            if command == "add":
                self._engine.add(client.sequence)
            else:
                self._engine.cancel(client.sequence)

    def _new_engine(self) -> Engine:
        sizes = {"max_batch": self.max_batch, "max_length": self.max_length, "num_pages": self.num_pages}
        return make_engine(self.model, self.reference, **sizes, reuse_prefixes=True)

    def _restart(self, error: Exception, failures: int) -> None:
        """Running requests are lost, because their caches may be corrupt. Queued ones move to a new engine."""
        lost = [*self._engine.running]
        try:
            if failures == MAX_FAILURES:
                raise error
            new = self._new_engine()
            for s in self._engine.waiting:
                new.add(s)
            counts = self._pass_counts()
            self._failed_engines = {name: value + self._failed_engines.get(name, 0.0) for name, value in counts.items()}
            self._engine = new
        except Exception as last:
            self.failure = last
            lost = list(self._clients)
        self._fail(lost, error)

    def _fail(self, sequences: list[Sequence], error: Exception) -> None:
        for s in sequences:
            if (client := self._clients.pop(s, None)) is not None:
                failed = EngineFailed(f"a pass failed: {type(error).__name__}: {error}")
                failed.__cause__ = error
                _send([(client, failed)])
