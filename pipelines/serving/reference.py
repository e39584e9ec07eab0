"""The reference model of the served application: its deployment, and the client that engines use.

Target and reference exchange token ids and sparse ReferenceSignals, never whole distributions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, cast

from ray import serve
from ray.serve.handle import DeploymentHandle

from pipelines.ray_cluster.hardware import device_of, gpu_share
from pipelines.ray_cluster.ranks import RankGroup, load_ranks
from pipelines.serving.metrics import export_metrics
from rcd_core import ReferenceSignals, WarmStart
from rcd_core.decode_settings import Weights
from rcd_core.decoding.memory import fit
from rcd_core.decoding.tensor_parallel import make_reference
from rcd_core.evaluation.flops import shape_of
from rcd_core.process import ProcessSettings
from rcd_core.signals import Signals
from rcd_core.training.plan import ModelShape

logger = logging.getLogger("ray.serve")
TIMEOUT_S = 20.0
RETRY_TIMEOUT_S = 5.0  # of the second try: another replica answers quickly or not at all
REFERENCE_THREADS = 16  # concurrent calls of one session; blocks of different requests start at different passes
REFERENCE_SESSIONS = 8  # groups of a target's requests, each routed to one of several reference replicas


class RemoteReference:
    """The reference deployment as an AsyncReference. Each batch is one call, tried twice.

    After two failures no call is made until a replica is ready again; meanwhile requests start from zero instead of
    waiting for timeouts one after the other. top_k: ids per position for requests that want the whole distribution,
    which is too large to send. sessions: number of groups of requests; Serve's router (graph.py) sends the blocks of a
    request to the replica that caches its context, as long as the set of replicas does not change. shape: size of the
    model, from the first answer on.
    """

    def __init__(self, handle: DeploymentHandle, top_k: int, sessions: int = 1) -> None:
        self.top_k = top_k
        self.shape: ModelShape | None = None
        self._asked_shape = False
        prefix = uuid.uuid4().hex
        self._sessions = [handle.options(session_id=f"{prefix}/{number}") for number in range(sessions)]
        self._fallback = handle.options(session_id=prefix)  # most likely another replica, for second tries
        self._threads = ThreadPoolExecutor(REFERENCE_THREADS * sessions, thread_name_prefix="reference")
        self._down = threading.Lock()  # held while a thread waits for the reference to come back

    def submit(self, requests: Sequence[WarmStart]) -> list[Future[Signals | None]]:
        """One future per request, in order. None: the reference cannot answer."""
        futures: list[Future[Signals | None]] = [Future() for _ in requests]
        groups: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(request.session % len(self._sessions), []).append(i)
        for session, group in groups.items():
            batch = [replace(requests[i], top_k=requests[i].top_k or self.top_k) for i in group]
            self._threads.submit(self._resolve, self._sessions[session], batch, [futures[i] for i in group])
        return futures

    def _resolve(self, handle: DeploymentHandle, batch: list[WarmStart], futures: list[Future[Signals | None]]) -> None:
        signals: Sequence[Signals | None] = [None] * len(batch)
        if not self._down.locked():
            try:
                signals = self._signals(handle, batch)
            except Exception:  # the engine counts it, and the client sees it under `rcd`
                logger.warning("the reference cannot answer; blocks start from zero", exc_info=True)
                if self._down.acquire(blocking=False):
                    # A daemon, so that it does not keep the replica of a deleted application alive.
                    threading.Thread(target=self._wait_until_ready, name="reference-waits", daemon=True).start()
        for future, value in zip(futures, signals, strict=True):
            future.set_result(value)

    def _signals(self, handle: DeploymentHandle, batch: list[WarmStart]) -> list[Signals]:
        try:
            replies = self._call(handle, "signals", TIMEOUT_S, batch)
        except Exception:  # most likely the replica died
            replies = self._call(self._fallback, "signals", RETRY_TIMEOUT_S, batch)
        if not self._asked_shape:
            self._asked_shape = True
            with contextlib.suppress(Exception):  # only statistics need it
                self.shape = self._call(self._fallback, "shape", RETRY_TIMEOUT_S)
        return [ReferenceSignals.from_bytes(reply) for reply in replies]

    def _wait_until_ready(self) -> None:
        try:
            while True:
                with contextlib.suppress(Exception):
                    self._call(self._fallback, "ready", TIMEOUT_S)
                    return
                time.sleep(1.0)
        finally:
            self._down.release()

    def _call(self, handle: DeploymentHandle, method: str, timeout_s: float, *args: Any) -> Any:
        response = getattr(handle, method).remote(*args)
        try:
            return response.result(timeout_s=timeout_s)
        except TimeoutError:
            response.cancel()
            raise


class Reference:
    """The deployment: holds the reference model and answers with signals as Arrow bytes.

    contexts: prompts whose KV stays cached, one per concurrent request, fewer if memory does not suffice. max_length:
    positions of a context. gpus: what the replica has asked Ray for. bundles, process: of RankGroup.
    """

    def __init__(
        self,
        checkpoint: str,
        gpus: float,
        contexts: int,
        max_length: int,
        attention: str = "auto",
        bundles: Sequence[Mapping[str, float]] = (),
        weights: Weights = "full",
        process: ProcessSettings | None = None,
    ) -> None:
        self.group = RankGroup(bundles, process=process)
        device, dtype = device_of(gpus)
        self.group.follow(partial(load_ranks, checkpoint, dtype, device, attention, weights=weights))
        model, _ = load_ranks(checkpoint, dtype, device, attention, self.group.ranks, weights)
        length = min(max_length, model.max_positions)
        share = gpu_share(gpus)
        contexts = fit(model, length, model.info.block_length, contexts, part=share, lanes=True).max_batch
        self.model = make_reference(model, contexts, length)
        self.thread = ThreadPoolExecutor(max_workers=1)  # one pass at a time, outside the event loop
        self.counts = {"reference_passes_total": 0.0, "reference_seconds_total": 0.0}
        self.export = asyncio.create_task(export_metrics(self.statistics))

    async def signals(self, requests: list[WarmStart]) -> list[bytes]:
        """One reply per request, in order. Raises ValueError for a request of the whole distribution."""
        if any(request.top_k is None for request in requests):  # checked here, so that it fails no other call
            raise ValueError("a whole distribution is too large to send: top_k is None")
        return await self._batched(requests)

    async def shape(self) -> ModelShape:
        """The size of the model."""
        return shape_of(self.model.model)

    async def ready(self) -> None:
        """Returns once the constructor has finished."""

    async def statistics(self) -> dict[str, float]:
        """Counters of this replica; serving/metrics.py describes each."""
        return {**self.counts, "reused_tokens_total": float(self.model.reused_tokens)}

    async def check_health(self) -> None:
        """Runs in the event loop, so it never waits for a pass of the model."""

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.0)
    async def _batched(self, calls: list[list[WarmStart]]) -> list[list[bytes]]:
        """Calls that arrived during the last pass share the next one."""
        requests = [request for call in calls for request in call]
        signals = iter(await asyncio.get_running_loop().run_in_executor(self.thread, self._signals, requests))
        return [[next(signals) for _ in call] for call in calls]

    def _signals(self, requests: list[WarmStart]) -> list[bytes]:
        started = time.perf_counter()
        signals = self.model.signals(requests)
        self.counts["reference_passes_total"] += 1
        self.counts["reference_seconds_total"] += time.perf_counter() - started
        return [cast(ReferenceSignals, s).to_bytes() for s in signals]
