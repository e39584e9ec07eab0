"""Bytes that a training writes."""

from __future__ import annotations

from rcd_core.training.plan import FP32, ModelShape, adapter_parameters, moments
from rcd_core.training.settings import TrainSettings


def checkpoint_bytes(shape: ModelShape, settings: TrainSettings) -> float:
    """Of one checkpoint to resume from, over all workers: what is trained, in fp32, and the optimiser's moments."""
    trained = float(shape.parameters if settings.lora is None else adapter_parameters(shape, settings.lora))
    return FP32 * trained + moments(shape, settings, trained)


def most_bytes(shape: ModelShape, settings: TrainSettings) -> tuple[float, float]:
    """(on the storage, in the nodes' temporary directories) at most at once, both over all workers: the checkpoints
    that are kept and the one being uploaded, and the copies of that one and of the next one."""
    one = checkpoint_bytes(shape, settings)
    return (settings.keep_checkpoints + 1) * one, 2 * one
