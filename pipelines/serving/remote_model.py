"""A Backend over a Target deployment, which survives the loss of replicas.

A request whose replica is lost is retried on another one. If the client has received text, the other replica resumes
after it. The seed is fixed before the first try, so every try gives the same text. If the other replica has another
checkpoint, the request restarts from the beginning, or ends with Unavailable if the client has received anything.
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
    NewToken,
    Overloaded,
    TextDelta,
    TraceStep,
    Unavailable,
)
from pipelines.serving.engine_thread import EngineGone, EventBatch
from pipelines.serving.target import FirstBatch, Refusal
from rcd_core.noise import NUM_SEED_BITS

MAX_TRIES = 3
RETRY_PAUSE_S = 0.2  # so that the router learns of the dead replica too
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
        # By gRPC between replicas: a third of the latency of Ray's object streams, which are made for large values.
        self._streaming = handle.options(stream=True, _by_reference=False)
        self._statistics: dict[str, dict[str, float]] = {}  # the last ones of every replica, lost ones included
        self._retries = 0

    async def stream(self, request: DecodeRequest) -> AsyncGenerator[DecodeEvent, None]:
        """Raises UserError or Overloaded on the first step, Unavailable if no replica survives or none has the
        checkpoint that began the answer. Without request.streamed, Finished is the only event."""
        seeded = _seeded(request)
        delivery = _Delivery(seeded)
        for attempt in range(1, MAX_TRIES + 1):
            batches: Any = self._streaming.stream.remote(delivery.request)
            delivery.begin_try()
            ended = False
            try:
                async for batch in batches:
                    if isinstance(batch, FirstBatch | Refusal):
                        delivery.check_checkpoint(batch.checkpoint)
                    if isinstance(batch, Refusal):
                        error = batch.error()
                        if attempt > 1 and isinstance(error, Overloaded):  # the request was accepted before
                            raise _Retry(error.retry_after_s)
                        raise error
                    for event in delivery.new_events(batch):
                        if request.streamed or isinstance(event, Finished):
                            yield event
                ended = True
                return
            except _Retry as full:
                pause, reason = full.pause_s, "the next one is full"
            except _OtherCheckpoint as error:
                if delivery.visible:
                    raise Unavailable("the model was replaced during the answer; send the request again") from error
                delivery, pause, reason = _Delivery(seeded), 0.0, "the next one has another checkpoint"
            except DeploymentUnavailableError as error:
                raise Unavailable("the model's replicas cannot be started; see its log") from error
            except _LOST as error:
                pause, reason = RETRY_PAUSE_S, type(error).__name__
            finally:
                if not ended:
                    batches.cancel()
            self._retries += 1
            logger.warning("a request lost its replica (%s); try %d of %d failed", reason, attempt, MAX_TRIES)
            await asyncio.sleep(pause)
        raise Unavailable(f"{MAX_TRIES} replicas in a row were lost during the request; send it again")

    async def ready(self) -> None:
        await self.handle.ready.remote()

    async def statistics(self) -> dict[str, float]:
        """Counters (names in _total) summed over all replicas so far, gauges over live ones."""
        response = self.handle.broadcast("statistics")
        replies = await response.results_async(timeout_s=STATISTICS_TIMEOUT_S, return_exceptions=True)
        live = dict(reply for reply in replies if not isinstance(reply, BaseException))
        self._statistics |= live
        total: dict[str, float] = {}
        for name in sorted({name for values in self._statistics.values() for name in values}):
            replicas = self._statistics if name.endswith("_total") else live
            total[name] = sum(values.get(name, 0.0) for values in replicas.values())
        return total | {"retries_total": float(self._retries), "replicas": float(len(live))}


class _Retry(Exception):
    def __init__(self, pause_s: float) -> None:
        super().__init__(f"the queue is full; retry in {pause_s:g} s")
        self.pause_s = pause_s


class _OtherCheckpoint(Exception):
    """A replica cannot resume an answer of another checkpoint."""


@dataclass
class _Delivery:
    """What a client has received, from whichever replicas. `request` asks for the rest."""

    request: DecodeRequest
    steps: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[NewToken] = field(default_factory=list)
    steps_since_block: int = 0  # of an unfinished block; another replica repeats them
    earlier_forwards: dict[str, int] = field(default_factory=dict)  # of earlier tries, up to their last finished block
    forwards: dict[str, int] = field(default_factory=dict)  # of this try, up to its last finished block
    num_repeated: int = 0  # steps that this try still repeats
    first: bool = True  # this try has sent nothing yet

    @property
    def visible(self) -> bool:
        """Whether the client has received anything."""
        return self.request.streamed and (self.request.num_sent > 0 or bool(self.steps))

    def check_checkpoint(self, checkpoint: str) -> None:
        """Note the checkpoint of the replica that answers. Raises _OtherCheckpoint if it cannot resume."""
        if (self.request.committed or self.steps) and checkpoint != self.request.checkpoint:
            raise _OtherCheckpoint
        self.request = replace(self.request, checkpoint=checkpoint)

    def begin_try(self) -> None:
        self.num_repeated, self.first = self.steps_since_block, True
        self.earlier_forwards, self.forwards = _sum(self.earlier_forwards, self.forwards), {}

    def new_events(self, batch: EventBatch) -> list[DecodeEvent]:
        """The events of a batch that the client does not have."""
        if self.first and batch.restarted:
            self.num_repeated, self.earlier_forwards = len(self.steps), {}
        self.first = False
        events: list[DecodeEvent] = []
        for event in batch.events:
            if isinstance(event, TraceStep):
                if self.num_repeated:
                    self.num_repeated -= 1
                    continue
                self.steps.append(event.step)
                self.steps_since_block += 1
            elif isinstance(event, TextDelta):
                self.steps_since_block = 0
                self.forwards = batch.forwards
                self.tokens += event.tokens
                committed = (*self.request.committed, *event.token_ids)
                num_sent = self.request.num_sent + len(event.text)
                self.request = replace(self.request, committed=committed, num_sent=num_sent)
            else:
                forwards = _sum(self.earlier_forwards, event.result.forwards)
                result = replace(event.result, forwards=forwards, steps=self.steps, tokens=self.tokens)
                event = Finished(result=result)
            events.append(event)
        return events


def _sum(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {kind: a.get(kind, 0) + b.get(kind, 0) for kind in {**a, **b}}


def _seeded(request: DecodeRequest) -> DecodeRequest:
    if request.settings.seed is not None:
        return request
    return replace(request, settings=replace(request.settings, seed=secrets.randbits(NUM_SEED_BITS)))
