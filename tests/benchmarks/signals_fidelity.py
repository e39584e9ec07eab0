"""Accuracy of sparse signals: the table of evaluation's signal fidelity over k, treatment and mass, and the losses of
targets that were trained with each kind of signals."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from rcd_core.dense_signals import DenseSignals
from rcd_core.evaluation.signal_fidelity import Kind, Report, Rule, kinds_up_to, measure, sparse_delta
from rcd_core.families.base import DiffusionModel
from rcd_core.families.loading import load_model
from rcd_core.signals import ReferenceSignals
from rcd_core.training.data.batches import collate
from rcd_core.training.data.examples import ExampleSource
from rcd_core.training.objective import TrainingBatch, masked_hidden, training_loss
from tests.benchmarks.signals_data import Workload

KS, MASSES, MASS_KS = (8, 16, 32, 64, 128), (0.9, 0.99, 0.999), (32, 128)
HELD_OUT = 1 << 20  # first row for measuring, in another epoch than the rows trained on


def table(workload: Workload, positions: int) -> Report:
    """All treatments at each k <= V / 4, and mean_tail at two of these with each mass."""
    reference, target = load_model(workload.reference), load_model(workload.target)
    kinds = kinds_up_to(reference.vocab_size, KS)
    kinds += [Kind(k, mass) for k in MASS_KS if Kind(k) in kinds for mass in MASSES]
    batches, num_masked = [], 0
    while num_masked < positions:
        batches.append(_batch(workload, reference, HELD_OUT + 64 * len(batches), 64))
        num_masked += int(batches[-1].masked.sum())
    return measure(reference, target, ((b, None) for b in batches), kinds, workload.rule)


def trained(workload: Workload, steps: int, kinds: list[Kind], rate: float, batch_size: int) -> dict[str, float]:
    """Relative change of the final loss if a target is trained with a kind's residuals instead of dense ones, from the
    same weights on the same rows; the loss is measured on held-out rows with dense residuals. For scale, the change of
    a run with dense residuals on other rows."""
    reference = load_model(workload.reference)
    held_out = [_batch(workload, reference, HELD_OUT + 64 * i, 64) for i in range(4)]

    def final_loss(kind: Kind | None, first_row: int) -> float:
        target = load_model(workload.start)
        for parameter in target.parameters():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(target.parameters(), lr=rate, weight_decay=0.0)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            batch = _batch(workload, reference, first_row + step * batch_size, batch_size)
            residual = _residual(reference, target, batch, kind, workload.rule)
            training_loss(target, batch, residual, weight="uniform").backward()
            torch.nn.utils.clip_grad_norm_(target.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            states = [(b, _residual(reference, target, b, None, workload.rule)) for b in held_out]
            return sum(float(training_loss(target, b, r, weight="uniform")) for b, r in states) / len(states)

    dense = final_loss(None, 0)
    changes = {_name(kind): final_loss(kind, 0) / dense - 1 for kind in kinds}
    return {"dense": dense, **changes, "dense, other rows": final_loss(None, steps * batch_size) / dense - 1}


def _residual(
    reference: DiffusionModel, target: DiffusionModel, batch: TrainingBatch, kind: Kind | None, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha, delta) with gradient to the target's table; kind None: from the dense distribution."""
    with torch.no_grad():
        logits = reference.head(masked_hidden(reference, batch, None)).float()
    weight = target.embedding.weight
    if kind is None:
        dense = DenseSignals(logits)
        return dense.alpha(len(weight), rule.alpha, rule.alpha_scale), dense.soft_embedding(weight)
    sparse = ReferenceSignals.from_logits(logits, kind.k, kind.mass)
    return sparse.alpha(len(weight), rule.alpha, rule.alpha_scale), sparse_delta(sparse, weight, kind.treatment)


def _batch(workload: Workload, model: DiffusionModel, first: int, rows: int) -> TrainingBatch:
    source = _SOURCES.setdefault(workload.files, ExampleSource(workload.files, workload.noise))
    batch, _ = collate(
        [source.row(g) for g in range(first, first + rows)],
        mask_token_id=model.mask_token_id,
        pad_token_id=model.info.pad_token_id,
        block_length=workload.block_length,
    )
    return batch


_SOURCES: dict[tuple[str, ...], ExampleSource] = {}


def _name(kind: Kind) -> str:
    return f"k {kind.k}" + (f", mass {kind.mass}" if kind.mass else "") + f", {kind.treatment}"


def as_json(report: Report) -> dict[str, Any]:
    """Rounded, kinds as names."""
    rows = []
    for row in report.rows:
        assert row.kind is not None
        rows.append(
            asdict(row.kind)
            | {"kept": round(row.kept, 2), "bytes_per_token": round(row.bytes_per_token, 1)}
            | {"error": float(f"{row.error:.3g}"), "loss_change": float(f"{row.loss_change:.3g}")}
            | {"error_by_decile": [float(f"{e:.3g}") for e in row.error_by_decile]}
        )
    return {
        "positions": report.positions,
        "entropy_by_decile": [round(e, 3) for e in report.entropy_by_decile],
        "loss_dense": round(report.loss_dense, 5),
        "loss_without": round(report.loss_without, 5),
        "rows": rows,
    }
