"""A Target deployment as the HTTP interface sees it: a Backend that outlives replicas.

A request whose replica is lost goes to another: as it was where nothing was sent yet, else with what was sent, so that
the stream goes on where it broke off. The seed is fixed before the first try: both tries give one text. Where the other
replica has another checkpoint, nothing of the first one's work is used: the request begins anew, unless its client has
seen some of it, which ends with Unavailable.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Any

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RaySystemError, WorkerCrashedError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from pipelines.serving.backend import (
    DecodeEvent,
    DecodeRequest,
    Finished,
    Overloaded,
    TextDelta,
    TraceStep,
    Unavailable,
)
from pipelines.serving.engine_thread import Batch, EngineGone
from pipelines.serving.target import FirstBatch, Refusal
from rcd_core.decoding.request import NUM_SEED_BITS

MAX_TRIES = 3
RETRY_PAUSE_S = 0.2  # in which the router hears of the death too
STATISTICS_TIMEOUT_S = 5.0
_LOST = (
    EngineGone,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RaySystemError,
    ReplicaUnavailableError,
    WorkerCrashedError,
)
logger = logging.getLogger("ray.serve")


class RemoteModel:
    """Backend over a handle of Target."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle
        # By gRPC from replica to replica: a third of the time that Ray's object streams take, which hold large values.
        self._streaming = handle.options(stream=True, _by_reference=False)
        self._seen: dict[str, dict[str, float]] = {}  # the last statistics of every replica there was
        self._retries = 0

    async def stream(self, request: DecodeRequest) -> AsyncGenerator[DecodeEvent, None]:
        """Raises UserError or Overloaded on the first step, Unavailable where no replica lives long enough, or none has
        the checkpoint any more with which the answer began. Unless streamed, there is one event, Finished."""
        seeded = _seeded(request)
        sent = _Sent(seeded)
        for attempt in range(1, MAX_TRIES + 1):
            batches: Any = self._streaming.stream.remote(sent.request)
            sent.begin_try()
            ended = False
            try:
                async for batch in batches:
                    if isinstance(batch, FirstBatch | Refusal):
                        sent.meet(batch.checkpoint)
                    if isinstance(batch, Refusal):
                        error = batch.error()
                        if attempt > 1 and isinstance(error, Overloaded):  # it had a place before
                            raise _Retry(error.retry_after_s)
                        raise error
                    for event in sent.news(batch):
                        if request.streamed or isinstance(event, Finished):
                            yield event
                ended = True
                return
            except _Retry as full:
                pause, why = full.pause_s, "another one is full"
            except _OtherCheckpoint as error:
                if sent.seen:
                    raise Unavailable("the model was replaced by another while it answered; send it again") from error
                sent, pause, why = _Sent(seeded), 0.0, "another has a different checkpoint"
            except DeploymentUnavailableError as error:
                raise Unavailable("the model's replicas cannot be started; its log says why") from error
            except _LOST as error:
                pause, why = RETRY_PAUSE_S, type(error).__name__
            finally:
                if not ended:
                    batches.cancel()
            self._retries += 1
            logger.warning("a request lost its replica (%s); try %d of %d failed", why, attempt, MAX_TRIES)
            await asyncio.sleep(pause)
        raise Unavailable(f"{MAX_TRIES} replicas in a row were lost while they worked on the request; send it again")

    async def ready(self) -> None:
        await self.handle.ready.remote()

    async def statistics(self) -> dict[str, float]:
        """Counters (names in _total) of all replicas there have been, gauges of those that live."""
        response = self.handle.broadcast("statistics")
        found = await response.results_async(timeout_s=STATISTICS_TIMEOUT_S, return_exceptions=True)
        live = dict(pair for pair in found if not isinstance(pair, BaseException))
        self._seen |= live
        names = {name for values in self._seen.values() for name in values}
        total = {
            name: sum(values.get(name, 0.0) for values in (self._seen if name.endswith("_total") else live).values())
            for name in sorted(names)
        }
        return total | {"retries_total": float(self._retries), "replicas": float(len(live))}


class _Retry(Exception):
    def __init__(self, pause_s: float) -> None:
        super().__init__(f"the queue is full, for {pause_s:g} s perhaps")
        self.pause_s = pause_s


class _OtherCheckpoint(Exception):
    """A replica cannot go on with what one of another checkpoint has begun."""


@dataclass
class _Sent:
    """What a client has of its answer, whichever replicas it came from. `request` asks for the rest."""

    request: DecodeRequest
    steps: list[dict[str, Any]] = field(default_factory=list)
    steps_since_block: int = 0  # told of a block that is not finished: another replica will go through them again
    before: dict[str, int] = field(default_factory=dict)  # passes of earlier tries, up to their last finished block
    forwards: dict[str, int] = field(default_factory=dict)  # of this try, up to its last finished block
    repeated: int = 0  # steps to come that have been told
    first: bool = True  # nothing has come of this try yet

    @property
    def seen(self) -> bool:
        """Whether the client has some of it."""
        return self.request.streamed and (self.request.told > 0 or bool(self.steps))

    def meet(self, checkpoint: str) -> None:
        """A replica answers. Raises _OtherCheckpoint."""
        if (self.request.committed or self.steps) and checkpoint != self.request.checkpoint:
            raise _OtherCheckpoint
        self.request = replace(self.request, checkpoint=checkpoint)

    def begin_try(self) -> None:
        self.repeated, self.first = self.steps_since_block, True
        self.before, self.forwards = _sum(self.before, self.forwards), {}

    def news(self, batch: Batch) -> list[DecodeEvent]:
        """The events of a batch that are news to the client."""
        if self.first and batch.anew:
            self.repeated, self.before = len(self.steps), {}
        self.first = False
        found: list[DecodeEvent] = []
        for event in batch.events:
            if isinstance(event, TraceStep):
                if self.repeated:
                    self.repeated -= 1
                    continue
                self.steps.append(event.step)
                self.steps_since_block += 1
            elif isinstance(event, TextDelta):
                self.steps_since_block = 0
                self.forwards = batch.forwards
                committed = (*self.request.committed, *event.token_ids)
                told = self.request.told + len(event.text)
                self.request = replace(self.request, committed=committed, told=told)
            else:
                forwards = _sum(self.before, event.result.forwards)
                event = Finished(result=replace(event.result, forwards=forwards, steps=self.steps))
            found.append(event)
        return found


def _sum(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {kind: a.get(kind, 0) + b.get(kind, 0) for kind in {**a, **b}}


def _seeded(request: DecodeRequest) -> DecodeRequest:
    if request.settings.seed is not None:
        return request
    return replace(request, settings=replace(request.settings, seed=secrets.randbits(NUM_SEED_BITS)))
