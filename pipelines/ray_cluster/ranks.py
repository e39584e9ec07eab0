"""Tensor parallel decoding on Ray: an actor in the first bundle of a placement group is rank 0, and starts the other
ranks as actors of its own in the other bundles.

A lost rank ends the process of rank 0, and Ray then ends the other ranks, because their owner is gone. Serve and Ray
Data replace an actor that has died, which starts all ranks anew in the same bundles or others.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pipelines.ray_cluster.hardware import device_of
from rcd_core.decode_settings import Weights
from rcd_core.decoding.reference import LocalReference
from rcd_core.decoding.tensor_parallel import follow
from rcd_core.families.base import DiffusionModel
from rcd_core.families.loading import load_model
from rcd_core.ops.ranks import ALONE, ProcessRanks, Ranks
from rcd_core.process import ProcessSettings

logger = logging.getLogger(__name__)
# (ranks) -> the rank's part of the target and, if each rank has one, its reference.
Load = Callable[[Ranks], tuple[DiffusionModel, LocalReference | None]]


def load_ranks(
    checkpoint: str,
    dtype: torch.dtype | None,
    device: str,
    attention: str,
    ranks: Ranks,
    weights: Weights = "full",
) -> tuple[DiffusionModel, None]:
    """A Load of one model, without a reference of its own."""
    model = load_model(checkpoint, dtype=dtype, device=device, attention=attention, ranks=ranks, weights=weights)
    return model, None


class RankGroup:
    """All ranks, of which this process is rank 0. bundles: resources of each rank, in Ray's terms; at most one: this
    process is alone. threads: of torch on a CPU, per rank. process: of all ranks."""

    def __init__(
        self,
        bundles: Sequence[Mapping[str, float]],
        threads: int | None = None,
        process: ProcessSettings | None = None,
    ) -> None:
        process = process or ProcessSettings()
        process.apply()
        self.ranks: Ranks = ALONE
        self._actors: list[Any] = []
        if len(bundles) <= 1:
            return
        size, bundle, host = len(bundles), bundles[0], ray.util.get_node_ip_address()
        gpus = bundle.get("GPU", 0.0)
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        others = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
        options = {"num_cpus": bundle.get("CPU", 0.0), "num_gpus": gpus, "resources": others}
        prefix, actor = uuid.uuid4().hex[:8], ray.remote(_Rank)
        self._actors = [
            actor.options(name=f"{prefix}-rank-{rank}", **options).remote(
                rank, size, host, store.port, gpus, threads, process
            )
            for rank in range(1, size)
        ]
        self._watch([one.ready.remote() for one in self._actors])
        self.ranks = ProcessRanks(0, size, device_of(gpus)[0], store)

    def follow(self, load: Load) -> None:
        """The other ranks load, and follow rank 0's engines until its `release`."""
        self._watch([one.follow.remote(load) for one in self._actors])

    def _watch(self, calls: list[Any]) -> None:
        threading.Thread(target=_end_with, args=(calls,), name="ranks", daemon=True).start()


def _end_with(calls: list[Any]) -> None:
    """End this process if one of the calls fails."""
    while calls:
        done, calls = ray.wait(calls)
        try:
            ray.get(done)
        except Exception:
            logger.exception("a rank of tensor parallel decoding is lost, so this process ends")
            os._exit(1)


class _Rank:
    def __init__(
        self, rank: int, size: int, host: str, port: int, gpus: float, threads: int | None, process: ProcessSettings
    ) -> None:
        process.apply()
        self.ranks = ProcessRanks(rank, size, device_of(gpus, threads)[0], TCPStore(host, port))

    def ready(self) -> None:
        """Returns once the constructor has finished."""

    def follow(self, load: Load) -> None:
        follow(*load(self.ranks))
