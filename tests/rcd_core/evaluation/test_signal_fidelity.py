"""Fidelity of sparse signals: formulas by hand, and the sensitivity of the measure."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rcd_core import ReferenceSignals, UserError
from rcd_core.evaluation.signal_fidelity import (
    Kind,
    Rule,
    by_decile,
    bytes_per_token,
    input_error,
    kinds_up_to,
    measure,
    sparse_delta,
)
from rcd_core.families.base import CheckpointInfo, DiffusionModel
from rcd_core.families.config import ModelConfig
from rcd_core.families.loading import new_model
from rcd_core.training.objective import TrainingBatch, masked_hidden, training_loss

VOCAB, WIDTH = 48, 16


def model(seed: int, width: int) -> DiffusionModel:
    sizes = ModelConfig(
        family="sdar", hidden_size=width, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=2 * width
    )
    return new_model(sizes, vocab_size=VOCAB, info=CheckpointInfo(3, (2,), 0, 8), seed=seed).eval()


def batch(seed: int, rows: int = 6, length: int = 16) -> TrainingBatch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (rows, length), generator=generator)
    masked = torch.rand(rows, length, generator=generator) < 0.5
    return TrainingBatch(ids, ids.clone(), torch.where(masked, 3, ids), masked, torch.full((rows,), 0.5), 8)


@pytest.fixture(scope="module")
def models() -> tuple[DiffusionModel, DiffusionModel]:
    return model(0, WIDTH), model(1, 2 * WIDTH)


def test_treatments_by_hand() -> None:
    logits, table = torch.randn(1, VOCAB) * 2, torch.randn(VOCAB, WIDTH)
    signals = ReferenceSignals.from_logits(logits, k=4)
    ids, p = signals.topk_ids[0].long(), signals.topk_logprobs[0].float().exp()
    others = [i for i in range(VOCAB) if i not in ids.tolist()]
    kept = p @ table[ids]
    close = torch.testing.assert_close
    close(sparse_delta(signals, table, "drop")[0], kept)
    close(sparse_delta(signals, table, "renormalise")[0], kept / p.sum())
    close(sparse_delta(signals, table, "mean_tail")[0], kept + signals.tail_mass[0] * table[others].mean(0))


def test_input_error_by_hand() -> None:
    alpha, mask = torch.tensor([0.5, 0.0]), torch.tensor([2.0, 0.0])
    dense, sparse = torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [9.0, 9.0]])
    # e = (1, 1) and (2, 0); alpha times the difference: (0, 0.5) and nothing
    torch.testing.assert_close(input_error(alpha, sparse, dense, mask), torch.tensor([0.5 / math.sqrt(2), 0.0]))


def test_deciles_are_ten_equal_parts_by_entropy() -> None:
    entropy = torch.randperm(1000).float()
    means = by_decile(entropy, entropy)
    assert means == pytest.approx([49.5 + 100 * i for i in range(10)])
    assert len(by_decile(torch.ones(3), torch.ones(3))) == 3


def test_bytes_count_what_is_stored() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, 5] = 30.0  # certain: one entry holds the mass
    signals = ReferenceSignals.from_logits(logits, k=8, mass=0.999)
    assert bytes_per_token(signals, ragged=True) == (1 + 8) / 2 * 6 + 4 + 4 + 2
    assert bytes_per_token(ReferenceSignals.from_logits(logits, k=8), "drop") == 8 * 6 + 4


def test_kinds_stop_at_a_quarter_of_the_vocabulary() -> None:
    kinds = kinds_up_to(271, masses=[0.99])
    assert sorted({k.k for k in kinds}) == [8, 16, 32, 64]
    assert len(kinds) == 4 * 3 + 1 and kinds[-1] == Kind(64, 0.99)
    assert {k.k for k in kinds_up_to(12)} == {3}
    with pytest.raises(UserError, match="treatment is 'zero'"):
        Kind(8, None, "zero")  # type: ignore[arg-type]


def test_measure_agrees_with_the_formula_and_with_the_loss(models: tuple[DiffusionModel, DiffusionModel]) -> None:
    """One batch and one kind, computed by hand from the model's parts."""
    reference, target = models
    data = batch(0)
    rule = Rule(alpha="calibrated_entropy", alpha_scale=4.0)
    report = measure(reference, target, [(data, None)], [Kind(4)], rule)
    with torch.no_grad():
        logits = reference.head(masked_hidden(reference, data, None))
        signals = ReferenceSignals.from_logits(logits, 4)
        table = target.embedding.weight
        alpha = (signals.entropy / 4.0).clamp(max=1.0)
        dense = logits.softmax(1) @ table
        want = input_error(alpha, signals.soft_embedding(table), dense, table[3]).mean()
        loss, loss_dense = (
            training_loss(target, data, (alpha, d), weight="uniform") for d in (signals.soft_embedding(table), dense)
        )
    (row,) = report.rows
    assert report.positions == int(data.masked.sum())
    assert row.error == pytest.approx(float(want), rel=1e-4) and row.error > 1e-3
    assert report.loss_dense == pytest.approx(float(loss_dense), rel=1e-6)
    assert row.loss_change == pytest.approx(float(loss / loss_dense - 1), abs=1e-6) and row.loss_change != 0
    assert report.loss_without != report.loss_dense


def test_more_entries_are_more_faithful(
    models: tuple[DiffusionModel, DiffusionModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Error falls with k down to fp16 rounding; adaptive k keeps fewer entries than its upper limit."""
    monkeypatch.setattr("rcd_core.evaluation.signal_fidelity._TILE_BYTES", 4 * VOCAB * 7)  # several tiles
    batches = [(batch(seed), None) for seed in range(2)]
    report = measure(*models, batches, [Kind(1), Kind(6), Kind(24), Kind(VOCAB), Kind(24, 0.6)], Rule(alpha="one"))
    errors = [row.error for row in report.rows[:4]]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3 < errors[-2]
    assert abs(report.rows[3].loss_change) < 1e-4 < abs(report.rows[0].loss_change)
    adaptive, full = report.rows[4], report.rows[2]
    assert adaptive.kept < full.kept == 24 and adaptive.error > full.error
    assert report.positions == sum(int(b.masked.sum()) for b, _ in batches)
    assert list(report.entropy_by_decile) == sorted(report.entropy_by_decile)


def test_stored_signals_are_one_more_row(
    models: tuple[DiffusionModel, DiffusionModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored signals of the same reference agree with recomputed ones; those of neighbouring positions do not."""
    monkeypatch.setattr("rcd_core.evaluation.signal_fidelity._TILE_BYTES", 4 * VOCAB * 7)  # several tiles
    reference, target = models
    data, whole = batch(0), Kind(VOCAB)
    with torch.no_grad():
        hidden = masked_hidden(reference, data, None)
        stored = ReferenceSignals.from_hidden(hidden, reference.lm_head_weight, VOCAB)
    shifted = stored[torch.arange(len(stored)).roll(1)]
    same, other = (measure(reference, target, [(data, s)], [whole]).rows for s in (stored, shifted))
    assert [row.kind for row in same] == [whole, None]
    assert replace(same[1], kind=whole) == same[0]
    assert other[1].error > 0.05 > 1e-3 > same[1].error


def test_a_sample_without_masked_positions_is_refused(models: tuple[DiffusionModel, DiffusionModel]) -> None:
    data = batch(0)
    data.masked = torch.zeros_like(data.masked)
    with pytest.raises(UserError, match="masked"):
        measure(*models, [(data, None)], [Kind(8)])
