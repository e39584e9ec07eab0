"""FLOPs and hours of a training, from the sizes of plan.py."""

from __future__ import annotations

from dataclasses import dataclass

from rcd_core.errors import UserError
from rcd_core.training.meter import PEAK_FLOPS
from rcd_core.training.plan import MEMORY, ModelShape
from rcd_core.training.settings import ResidualSettings

SELF_FORWARDS = 1.5  # residual source self: one or two more passes over each row


@dataclass(frozen=True)
class TrainingCost:
    """Of a whole run. tokens: clean ones of all rows; masked: of these; flops: as in the meter's MFU; hours: at this
    MFU."""

    tokens: float
    masked: float
    flops: float
    hours: float


def training_cost(
    shape: ModelShape,
    rows: int,
    tokens_per_row: float,
    labelled_share: float,
    gpus: int,
    device: str,
    mfu: float,
    extra_forwards: float = 0.0,
) -> TrainingCost:
    """rows: over all steps. extra_forwards: passes per row in addition to the trained one, in units of this model's
    forward (online reference, self-residual); they take time but do not count as useful FLOPs."""
    tokens = rows * tokens_per_row
    masked = tokens * labelled_share / 2
    flops = 3 * forward_flops(shape, tokens, masked)
    seconds = flops * (1 + extra_forwards / 3) / (peak(device) * mfu * gpus)
    return TrainingCost(tokens, masked, flops, seconds / 3600)


def forward_flops(shape: ModelShape, tokens: float, masked: float) -> float:
    """Of forward passes in training, which read a row of SDAR twice; a backward pass takes twice as many."""
    entered = tokens * (2 if shape.family == "sdar" else 1)
    return 2.0 * (shape.active_layers * entered + shape.head_parameters * masked)


def extra_forwards(residual: ResidualSettings | None, distill: bool, reference_share: float) -> float:
    """Forward passes per row in addition to the trained one, in units of the trained model's.

    reference_share: parameters of the reference / of the trained model.
    """
    online = distill
    forwards = 0.0
    if residual is not None:
        forwards = SELF_FORWARDS if residual.needs_noisier else float(residual.runs_model)
        forwards += SELF_FORWARDS * residual.self_share
        online = online or residual.source == "online"
    if online:
        forwards += (1.0 - (residual.self_share if residual else 0.0)) * reference_share
    return forwards


def peak(device: str) -> float:
    """bf16 FLOP/s of a GPU by name; UserError if it is unknown."""
    if device not in MEMORY:
        raise UserError(f"device {device!r} is unknown; known: {', '.join(MEMORY)}")
    return PEAK_FLOPS[device]
