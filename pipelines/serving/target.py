"""The Target deployment: one model with its tokenizer, in an engine thread."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from pipelines.ray_cluster.hardware import device_of, gpu_share
from pipelines.ray_cluster.ranks import RankGroup, load_ranks
from pipelines.serving.backend import DecodeRequest, DecodingFailed, Overloaded
from pipelines.serving.engine_thread import EngineFailed, EngineThread, EventBatch
from pipelines.serving.metrics import export_metrics
from pipelines.serving.reference import RemoteReference
from rcd_core import UserError
from rcd_core.decode_settings import DecodeSettings, Weights
from rcd_core.decoding.memory import fit
from rcd_core.decoding.request import uncalibrated
from rcd_core.families.base import DiffusionModel
from rcd_core.families.quantise import stored_tensors
from rcd_core.io.node_copy import node_copy
from rcd_core.process import ProcessSettings
from rcd_core.text.tokenizer import load_tokenizer

logger = logging.getLogger("ray.serve")
MAX_LENGTH = 4096  # positions of a request, unless the recipe or the model has fewer
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


@dataclass(frozen=True)
class FirstBatch(EventBatch):
    """The first batch of a replica. checkpoint: weights_id of its model."""

    checkpoint: str = ""


@dataclass(frozen=True)
class Refusal:
    """A UserError; Overloaded if retry_after_s is set; DecodingFailed if the request has begun. A value, because Serve
    logs a traceback of exceptions."""

    message: str
    checkpoint: str
    retry_after_s: float | None = None
    failed: bool = False

    def error(self) -> Exception:
        if self.failed:
            return DecodingFailed(self.message)
        return UserError(self.message) if self.retry_after_s is None else Overloaded(self.retry_after_s)


class Target:
    """The deployment. max_batch: requests decoded at once, fewer if memory does not suffice. max_queue: requests that
    may wait. max_length: positions of a request; None: the model's, at most MAX_LENGTH. gpus: what the replica has
    asked Ray for. bundles, process: of RankGroup. reference_top_k, reference_sessions: of RemoteReference. has_t_res:
    requests have a default residual_temperature."""

    def __init__(
        self,
        checkpoint: str,
        gpus: float,
        reference: DeploymentHandle | None,
        *,
        reference_top_k: int,
        reference_sessions: int,
        max_batch: int,
        max_queue: int,
        max_length: int | None,
        bundles: Sequence[Mapping[str, float]] = (),
        process: ProcessSettings | None = None,
        attention: str = "auto",
        weights: Weights = "full",
        has_t_res: bool = False,
    ) -> None:
        self.group = RankGroup(bundles, process=process)
        device, dtype = device_of(gpus)
        self.group.follow(partial(load_ranks, checkpoint, dtype, device, attention, weights=weights))
        checkpoint = node_copy(checkpoint)  # once, so that model and tokenizer are of the same version
        model, _ = load_ranks(checkpoint, dtype, device, attention, self.group.ranks, weights)
        residual = bool(model.info.rcd) or reference is not None
        if not has_t_res and (message := uncalibrated(DecodeSettings(residual=residual), model)):
            logger.warning("%s: %s", checkpoint, message)
        self.checkpoint = weights_id(model)
        length = min(model.max_positions, max_length or MAX_LENGTH)
        plan = fit(model, length, model.info.block_length, max_batch, part=gpu_share(gpus))
        self.engine = EngineThread(
            model,
            load_tokenizer(checkpoint),
            RemoteReference(reference, reference_top_k, reference_sessions) if reference else None,
            max_batch=plan.max_batch,
            max_length=length,
            max_queue=max_queue,
            num_pages=plan.num_pages,
        )
        self.replica_id = serve.get_replica_context().replica_id.unique_id
        self.export = asyncio.create_task(export_metrics(self.engine.statistics))

    async def stream(self, request: DecodeRequest) -> AsyncIterator[EventBatch | Refusal]:
        """One batch per pass that has events, the first one a FirstBatch; or a single Refusal."""
        if request.committed and request.checkpoint != self.checkpoint:  # the ids may be outside its vocabulary
            yield Refusal("a model with another checkpoint began the answer", self.checkpoint)
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
        except EngineFailed as error:
            if not isinstance(error.__cause__, ArithmeticError):
                raise
            logger.error("a request failed: %s", error.__cause__)
            yield Refusal(str(error.__cause__), self.checkpoint, failed=True)

    async def ready(self) -> None:
        """Returns once the constructor has finished; raises EngineGone if the engine gave up."""
        await self.engine.ready()

    async def statistics(self) -> tuple[str, dict[str, float]]:
        """(Replica id, its statistics)."""
        return self.replica_id, await self.engine.statistics()

    async def check_health(self) -> None:
        """Runs in the event loop, so it never waits for a pass of the model."""
        self.engine.check()


def weights_id(model: DiffusionModel) -> str:
    """16 hex digits that identify weights, settings and precision, on any device and from any path; of a split model
    those of rank 0, so they differ with the number of ranks.

    Each tensor enters as the sum of its bits: exact in any order, and fast on its device. A collision of two trainings
    is practically impossible; this is no protection against a deliberate one.
    """
    digest = hashlib.sha256(repr(model.info).encode())
    for name, weights in model.named_parameters():
        for part in stored_tensors(weights):
            bits = part.view(_INTEGERS[part.element_size()])
            digest.update(f"{name} {tuple(part.shape)} {part.dtype} {int(bits.sum(dtype=torch.int64))}".encode())
    return digest.hexdigest()[:16]
