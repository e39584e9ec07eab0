"""Residuals from the model's own passes in training, and the controls: against the same passes made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rcd_core import ReferenceSignals, UserError, load_model
from rcd_core.noise import NoiseSettings, mask_example, nested_masks
from rcd_core.residual import ResidualSettings
from rcd_core.signals import residual_state
from rcd_core.training.data.batches import MAX_PASSES, Collator, MicroBatch, pack
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.loss_module import LossModule
from rcd_core.training.objective import loss_sum, masked_hidden
from rcd_core.training.settings import TrainSettings

GOLDEN = Path(__file__).parents[2] / "golden"
NOISE = NoiseSettings(seed=4)
FAMILIES = ["sdar", "llada"]


def rows() -> list[TrainingRow]:
    generator = np.random.default_rng(1)
    made = []
    for i, length in enumerate((16, 12, 20, 8, 16, 12)):
        ids = generator.integers(0, 490, length)
        labels = np.where(np.arange(length) >= 4, ids, -100)
        masked, p = mask_example(labels >= 0, f"row{i}", 0, NOISE)
        made.append(TrainingRow(i, f"row{i}", 0, ids, labels, masked, p))
    return made


def maker(source: Any, **changes: Any) -> Collator:
    settings = TrainSettings(steps=1, batch_size=6, pack_length=32, **changes)
    residual = ResidualSettings(source=source, dropout=0.0)
    return Collator(
        settings=settings,
        residual=residual,
        mask_token_id=511,
        pad_token_id=500,
        block_length=4,
        block_diffusion=False,
        noise=NOISE,
    )


def test_noisier_masks_are_nested() -> None:
    maskable = np.arange(200) >= 20
    for draw in range(6):
        masked, p = mask_example(maskable, "x", draw, NOISE)
        near, far, all_of_it = nested_masks(maskable, "x", draw, NOISE, [0.1, 0.2, 1.0])
        assert (masked <= near).all() and (near <= far).all() and (far <= all_of_it).all()
        assert (all_of_it == maskable).all()
        assert near.sum() == pytest.approx(min(1.0, p[0] + 0.1) * 180, abs=30)


def test_packing_keeps_every_row_once_and_in_order() -> None:
    bins = pack(rows(), 32)
    assert sorted(r.index for b in bins for r in b) == list(range(6))
    assert all(sum(len(r.input_ids) for r in b) <= 32 for b in bins)
    assert all([r.index for r in b] == sorted(r.index for r in b) for b in bins)
    assert [len(b) for b in pack(rows(), None)] == [1] * 6
    assert [len(b) for b in pack(rows(), 10)] == [1] * 6, "a row longer than pack_length stands alone"


@pytest.mark.parametrize("family", FAMILIES)
def test_own_passes_are_those_made_by_hand(family: str) -> None:
    model = load_model(GOLDEN / f"{family}_tiny")
    micro = replace(maker("self"), mask_token_id=model.mask_token_id)
    (micro,) = micro.micro_batches(rows())
    assert isinstance(micro, MicroBatch) and micro.chain is not None and micro.depth is not None
    far, near = micro.chain
    masked = micro.batch.masked
    assert (masked <= near).all() and (near <= far).all()
    inside = micro.batch.sample_ids >= 0  # type: ignore[operator]
    assert set(micro.depth[inside].tolist()) == {1, MAX_PASSES} and not micro.depth[~inside].any()
    assert torch.equal(far[micro.depth == 1], near[micro.depth == 1])

    def a_pass(where: torch.Tensor, state: Any) -> tuple[torch.Tensor, torch.Tensor]:
        noisy = torch.where(where, model.mask_token_id, micro.batch.input_ids)
        hidden = masked_hidden(model, replace(micro.batch, masked=where, noisy_ids=noisy), state)
        signals = ReferenceSignals.from_hidden(hidden, model.lm_head_weight, 32)
        return residual_state(signals, model.embedding.weight, "normalized_entropy", None)

    with torch.no_grad():
        alpha, delta = a_pass(far, None)
        alpha, delta = (alpha * (micro.depth[far] == 2))[near[far]], delta[near[far]]
        alpha, delta = a_pass(near, (alpha, delta))
        state = alpha[masked[near]], delta[masked[near]]
        want = loss_sum(model, micro.batch, state)
        found, statistics = LossModule(model, "inverse_t", ResidualSettings(source="self"))(micro, None)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=0)
        torch.testing.assert_close(statistics[0], state[0].sum().double(), rtol=1e-5, atol=0)
        plain = loss_sum(model, micro.batch, None)
        assert abs(float(found - plain)) > 1e-3, "the residual does something"


@pytest.mark.parametrize("family", FAMILIES)
def test_on_policy_masks_are_what_the_model_is_least_sure_of(family: str) -> None:
    model = load_model(GOLDEN / f"{family}_tiny")
    (micro,) = replace(maker("on_policy"), mask_token_id=model.mask_token_id).micro_batches(rows())
    module = LossModule(model, "inverse_t", ResidualSettings(source="on_policy"))
    batch = module._on_policy(micro)
    assert micro.chain is not None and batch.sample_ids is not None
    assert not (batch.masked & ~micro.chain[-1]).any()
    noisy = torch.where(micro.chain[-1], model.mask_token_id, batch.input_ids)
    with torch.no_grad():
        hidden = masked_hidden(model, replace(micro.batch, masked=micro.chain[-1], noisy_ids=noisy), None)
        confidence = torch.zeros(batch.masked.shape)
        confidence[micro.chain[-1]] = torch.softmax(model.head(hidden), -1).amax(-1)
    changed = 0
    for row in range(len(batch.masked)):
        for sample in range(int(batch.sample_ids[row].max()) + 1):
            mine = batch.sample_ids[row] == sample
            left, given = batch.masked[row] & mine, micro.chain[-1][row] & mine & ~batch.masked[row]
            assert left.sum() == (micro.batch.masked[row] & mine).sum()
            if left.any() and given.any():
                assert confidence[row][left].max() <= confidence[row][given].min()
            changed += int((left != (micro.batch.masked[row] & mine)).sum())
    assert changed, "the masks are others than the random ones"
    assert (batch.noisy_ids[batch.masked] == model.mask_token_id).all()
    assert torch.equal(batch.noisy_ids[~batch.masked], batch.input_ids[~batch.masked])


@pytest.mark.parametrize("source", ["self", "self_same", "on_policy"])
def test_the_loop_trains_on_them(source: Any) -> None:
    class Fixed:
        def row(self, index: int) -> TrainingRow:
            return replace(rows()[index % 6], index=index)

    logged: list[dict[str, float]] = []
    settings = TrainSettings(steps=30, batch_size=6, learning_rate=3e-3, log_every=10, loss_weight="uniform")
    residual = ResidualSettings(source=source, dropout=0.0)
    model = load_model(GOLDEN / "sdar_tiny").requires_grad_(True)
    callbacks = Callbacks(logged.append, lambda step, save: None)
    with pytest.raises(UserError, match="needs the noise of the rows"):
        train(model, Fixed(), settings, residual, 4, callbacks)
    train(model, Fixed(), settings, residual, 4, callbacks, noise=NOISE)
    assert logged[-1]["loss"] < 0.5 * logged[0]["loss"]
    assert (logged[-1]["mean_alpha"] > 0) == (source != "on_policy")
    buckets = [v for k, v in logged[-1].items() if k.startswith("loss_p")]
    assert buckets and min(buckets) <= logged[-1]["loss"] * 1.001 and max(buckets) >= logged[-1]["loss"] * 0.999
    assert 0 <= logged[-1]["data_wait_share"] <= 1 and logged[-1]["peak_memory_gib"] > 0.05
