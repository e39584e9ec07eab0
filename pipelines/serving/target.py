"""The Target deployment: a model with its tokenizer, in an engine. Requests come as texts."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from pipelines.serving.backend import DecodeRequest, Overloaded
from pipelines.serving.engine_thread import Batch, EngineThread
from pipelines.serving.metrics import keep_telling
from pipelines.serving.reference import RemoteReference
from rcd_core import UserError, load_model
from rcd_core.decode_settings import DecodeSettings
from rcd_core.decoding.memory import fit_batch
from rcd_core.decoding.request import uncalibrated
from rcd_core.families.base import DiffusionModel
from rcd_core.io.node_copy import node_copy
from rcd_core.text.tokenizer import load_tokenizer

logger = logging.getLogger("ray.serve")
MAX_LENGTH = 4096  # positions of a request where neither the recipe nor the model has fewer
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


@dataclass(frozen=True)
class FirstBatch(Batch):
    """What a replica answers first. checkpoint: weights_id of its model."""

    checkpoint: str = ""


@dataclass(frozen=True)
class Refusal:
    """A UserError, or Overloaded with retry_after_s. A value: of an exception Serve would log a traceback."""

    message: str
    checkpoint: str
    retry_after_s: float | None = None

    def error(self) -> Exception:
        return UserError(self.message) if self.retry_after_s is None else Overloaded(self.retry_after_s)


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """max_batch: requests under way at once, fewer where the memory does not suffice. max_queue: requests waiting
    beyond these. max_length: positions of a request; None: the model's, at most MAX_LENGTH. gpu_part: what the replica
    has of a GPU."""

    max_batch: int
    max_queue: int
    max_length: int | None
    gpu_part: float = 1.0


class Target:
    """Holds a target model with its tokenizer, in an engine."""

    def __init__(
        self,
        checkpoint: str,
        device: str,
        reference: DeploymentHandle | None,
        reference_top_k: int,
        reference_sessions: int,
        limits: EngineLimits,
    ) -> None:
        checkpoint = node_copy(checkpoint)  # once: model and tokenizer are of one version
        model = load_model(checkpoint, device=device)
        fed = bool(model.info.rcd) or reference is not None
        if message := uncalibrated(DecodeSettings(residual=fed), model):
            logger.warning("%s: %s", checkpoint, message)
        self.checkpoint = weights_id(model)
        length = min(model.max_positions, limits.max_length or MAX_LENGTH)
        self.engine = EngineThread(
            model,
            load_tokenizer(checkpoint),
            RemoteReference(reference, reference_top_k, reference_sessions) if reference else None,
            max_batch=fit_batch(model, length, model.info.block_length, limits.max_batch, part=limits.gpu_part),
            max_length=length,
            max_queue=limits.max_queue,
        )
        self.replica_id = serve.get_replica_context().replica_id.unique_id
        self.telling = asyncio.create_task(keep_telling(self.engine.statistics))

    async def stream(self, request: DecodeRequest) -> AsyncIterator[Batch | Refusal]:
        """A Batch after each pass that brought something, a FirstBatch before the others, or one Refusal."""
        if request.committed and request.checkpoint != self.checkpoint:  # ids that may not even be in its vocabulary
            yield Refusal("a model of another checkpoint has begun the answer", self.checkpoint)
            return
        first = True
        try:
            async with contextlib.aclosing(self.engine.batches(request)) as batches:
                async for batch in batches:
                    yield FirstBatch(**vars(batch), checkpoint=self.checkpoint) if first else batch
                    first = False
        except UserError as error:
            yield Refusal(str(error), self.checkpoint)
        except Overloaded as error:
            yield Refusal(str(error), self.checkpoint, error.retry_after_s)

    async def ready(self) -> None:
        """Answers once the constructor is through; raises where the engine has given up."""
        await self.engine.ready()

    async def statistics(self) -> tuple[str, dict[str, float]]:
        """Of this replica, by its id."""
        return self.replica_id, await self.engine.statistics()

    async def check_health(self) -> None:
        """Answers from the event loop, so never waits for a pass of the model."""
        self.engine.check()


def weights_id(model: DiffusionModel) -> str:
    """16 hex digits: the same for the same weights and settings in the same precision, on any device.

    Weights enter by the sum of their bits, per tensor: exact in any order, and quick where they lie. That two trainings
    agree in every sum is as good as impossible; it is no protection against someone who wants them to.
    """
    told = hashlib.sha256(repr(model.info).encode())
    for name, weights in model.named_parameters():
        bits = weights.detach().view(_INTEGERS[weights.element_size()])
        told.update(f"{name} {tuple(weights.shape)} {weights.dtype} {int(bits.sum(dtype=torch.int64))}".encode())
    return told.hexdigest()[:16]
