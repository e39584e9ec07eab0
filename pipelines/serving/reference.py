"""The reference model of the served application: its deployment, and how engines ask it.

Between a target and its reference travel token ids and sparse ReferenceSignals, never whole distributions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from pipelines.serving.metrics import keep_telling
from rcd_core import LocalReference, ReferenceSignals, WarmStart, load_model
from rcd_core.decoding.memory import fit_batch
from rcd_core.signals import Signals

logger = logging.getLogger("ray.serve")
REFERENCE_TIMEOUT_S = 20.0
RETRY_TIMEOUT_S = 5.0  # of the second try: a replica to take over is there at once or not soon
REFERENCE_THREADS = 16  # questions on their way at once; blocks of different requests begin at different passes
REFERENCE_SESSIONS = 8  # a target's requests in so many groups, each at home with one of several reference replicas


class RemoteReference:
    """The reference deployment as the engine sees it, an AsyncReference: each batch is one call, tried twice.

    After two failures nothing is asked until a replica has answered that it is ready: requests start from zero instead
    of waiting in vain, one after the other. top_k: ids per position where a request wants all of them, which is too
    much to send. sessions: into how many groups requests are parted; Serve's router (graph.py) sends the blocks of a
    request to the replica that has its context, as long as there are the same replicas.
    """

    def __init__(self, handle: DeploymentHandle, top_k: int, sessions: int = 1) -> None:
        self.top_k = top_k
        own = uuid.uuid4().hex
        self._homes = [handle.options(session_id=f"{own}/{number}") for number in range(sessions)]
        self._elsewhere = handle.options(session_id=own)  # another home, mostly, for second tries
        self._threads = ThreadPoolExecutor(REFERENCE_THREADS * sessions, thread_name_prefix="reference")
        self._waiting = threading.Lock()  # held by whoever waits for the reference to come back

    def submit(self, requests: Sequence[WarmStart]) -> list[Future[Signals | None]]:
        """One future per request; None where the reference cannot answer."""
        futures: list[Future[Signals | None]] = [Future() for _ in requests]
        parts: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            parts.setdefault(request.session % len(self._homes), []).append(i)
        for home, part in parts.items():
            asked = [replace(requests[i], top_k=requests[i].top_k or self.top_k) for i in part]
            self._threads.submit(self._answer, self._homes[home], asked, [futures[i] for i in part])
        return futures

    def _answer(self, home: DeploymentHandle, asked: list[WarmStart], futures: list[Future[Signals | None]]) -> None:
        found: Sequence[Signals | None] = [None] * len(asked)
        if not self._waiting.locked():
            try:
                found = self._ask(home, asked)
            except Exception:  # counted by the engine, told to the client under `rcd`
                logger.warning("the reference cannot answer; blocks start from zero", exc_info=True)
                if self._waiting.acquire(blocking=False):
                    # A daemon: it must not keep a replica alive whose application is gone for good.
                    threading.Thread(target=self._wait, name="reference-waits", daemon=True).start()
        for future, signals in zip(futures, found, strict=True):
            future.set_result(signals)

    def _ask(self, home: DeploymentHandle, asked: list[WarmStart]) -> list[Signals]:
        try:
            replies = self._call(home, "signals", REFERENCE_TIMEOUT_S, asked)
        except Exception:  # its replica died, most likely: another may be there
            replies = self._call(self._elsewhere, "signals", RETRY_TIMEOUT_S, asked)
        return [ReferenceSignals.from_bytes(reply) for reply in replies]

    def _wait(self) -> None:
        try:
            while True:
                with contextlib.suppress(Exception):
                    self._call(self._elsewhere, "ready", REFERENCE_TIMEOUT_S)
                    return
                time.sleep(1.0)
        finally:
            self._waiting.release()

    def _call(self, handle: DeploymentHandle, method: str, timeout_s: float, *given: Any) -> Any:
        response = getattr(handle, method).remote(*given)
        try:
            return response.result(timeout_s=timeout_s)
        except TimeoutError:
            response.cancel()
            raise


class Reference:
    """Holds the reference model; answers with signals in their Arrow form. Contexts stay in its cache: as many as
    there can be requests, fewer where the memory does not suffice.

    contexts: those requests. max_length: their positions at most. gpu_part: what it has of a GPU.
    """

    def __init__(self, checkpoint: str, device: str, contexts: int, max_length: int, gpu_part: float) -> None:
        model = load_model(checkpoint, device=device)
        length = min(max_length, model.max_positions)
        contexts = fit_batch(model, length, model.info.block_length, contexts, part=gpu_part)
        self.model = LocalReference(model, contexts, length)
        self.thread = ThreadPoolExecutor(max_workers=1)  # one pass at a time, off the event loop
        self.counts = {"reference_passes_total": 0.0, "reference_seconds_total": 0.0}
        self.telling = asyncio.create_task(keep_telling(self.statistics))

    async def signals(self, requests: list[WarmStart]) -> list[bytes]:
        return await self._merged(requests)

    async def ready(self) -> None:
        """Answers once the constructor is through."""

    async def statistics(self) -> dict[str, float]:
        """Of this replica: its passes, each for all blocks that were asked for at once, their time, and what of the
        contexts its cache had already."""
        return {**self.counts, "reused_tokens_total": float(self.model.reused_tokens)}

    async def check_health(self) -> None:
        """Answers from the event loop, so never waits for a pass of the model."""

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.0)
    async def _merged(self, calls: list[list[WarmStart]]) -> list[list[bytes]]:
        """Whatever has come in during the last pass goes through the next one together."""
        everything = [request for call in calls for request in call]
        found = await asyncio.get_running_loop().run_in_executor(self.thread, self._signals, everything)
        answers = iter(found)
        return [[next(answers) for _ in call] for call in calls]

    def _signals(self, requests: list[WarmStart]) -> list[bytes]:
        begun = time.perf_counter()
        found = self.model.signals(requests)
        self.counts["reference_passes_total"] += 1
        self.counts["reference_seconds_total"] += time.perf_counter() - begun
        return [signals.to_bytes() for signals in found if isinstance(signals, ReferenceSignals)]
