"""Self-residual sources and the controls, checked against the same passes written out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rcd_core import ReferenceSignals, UserError, load_model
from rcd_core.noise import NoiseSettings, mask_example, nested_masks
from rcd_core.signals import residual_state
from rcd_core.training.controls import on_policy_batch
from rcd_core.training.data.batches import MAX_PASSES, Collator, collate, pack
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.loss_module import LossModule
from rcd_core.training.objective import loss_sum, masked_hidden, reference_signals
from rcd_core.training.own_signals import OwnSignals, own_signals
from rcd_core.training.settings import ResidualSettings, SignalRule, TrainSettings

GOLDEN = Path(__file__).parents[2] / "golden"
NOISE = NoiseSettings(seed=4)


def training_rows() -> list[TrainingRow]:
    generator = np.random.default_rng(1)
    rows = []
    for i, length in enumerate((16, 12, 20, 8, 16, 12)):
        ids = generator.integers(0, 490, length)
        labels = np.where(np.arange(length) >= 4, ids, -100)
        rows.append(TrainingRow(i, f"row{i}", 0, ids, labels, *mask_example(labels >= 0, f"row{i}", 0, NOISE)))
    return rows


@pytest.fixture(params=["sdar", "llada"])
def model(request: pytest.FixtureRequest) -> Any:
    return load_model(GOLDEN / f"{request.param}_tiny")


def micro_batch(model: Any, source: Any) -> Any:
    collator = Collator(
        settings=TrainSettings(steps=1, batch_size=6, pack_length=32),
        residual=ResidualSettings(source=source, dropout=0.0),
        mask_token_id=model.mask_token_id,
        pad_token_id=500,
        block_length=4,
        block_diffusion=False,
        noise=NOISE,
    )
    (micro,) = collator.micro_batches(training_rows())
    return micro


def test_noisier_masks_are_nested() -> None:
    maskable = np.arange(200) >= 20
    for draw in range(6):
        masked, p = mask_example(maskable, "x", draw, NOISE)
        near, far, full = nested_masks(maskable, "x", draw, NOISE, [0.1, 0.2, 1.0])
        assert (masked <= near).all() and (near <= far).all() and (far <= full).all()
        assert (full == maskable).all()
        assert near.sum() == pytest.approx(min(1.0, p[0] + 0.1) * 180, abs=30)


def test_packing_keeps_every_row_once_and_in_order() -> None:
    bins = pack(training_rows(), 32)
    assert sorted(r.index for b in bins for r in b) == list(range(6))
    assert all(sum(len(r.input_ids) for r in b) <= 32 for b in bins)
    assert all([r.index for r in b] == sorted(r.index for r in b) for b in bins)
    assert [len(b) for b in pack(training_rows(), None)] == [1] * 6
    assert [len(b) for b in pack(training_rows(), 10)] == [1] * 6, "a row longer than pack_length is packed alone"


def test_signals_that_the_model_made_itself_are_its_self_residual(model: Any) -> None:
    """The loss of a training with rounds, before the target moves away from the copy that made the signals."""
    rows = training_rows()
    rule = ResidualSettings(source="self", dropout=0.0, top_k=16)
    own = OwnSignals(model, rule, SignalRule(top_k=16), NOISE, 4, seed=0)
    cached = [replace(row, signals=own([row])[1]) for row in rows]
    losses = []
    for source, given in (("self", rows), ("signals", cached)):
        collator = replace(own.collator, residual=replace(rule, source=source))  # type: ignore[arg-type]
        (micro,) = collator.micro_batches(given)
        with torch.no_grad():
            module = LossModule(model, "uniform", replace(rule, source=source))  # type: ignore[arg-type]
            losses.append(module(micro, micro.signals)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_rows_masked_as_decoding_leaves_them(model: Any) -> None:
    """Of each block as many tokens as before, those that the last earlier pass is least sure of, with its predictions
    there; a model without residuals gives none to its second pass."""
    rows = training_rows()
    for source in ("self", "none"):
        settings = ResidualSettings(source=source, dropout=0.0, top_k=16)  # type: ignore[arg-type]
        own = OwnSignals(model, settings, SignalRule(top_k=16), NOISE, 4, seed=0, on_policy=1.0)
        masked_anew, signals = own(rows)
        (micro,) = own.collator.micro_batches(rows)
        noisier = micro.noisier_masks[-1]
        plain = own_signals(model, replace(micro, batch=micro.batch.remasked(noisier, 511)), settings, own.rule)
        at, given = 0, 0
        for i, (before, after) in enumerate(zip(rows, masked_anew, strict=True)):
            wider = noisier[i, : len(before.masked)].numpy()
            assert not (after.masked & ~wider).any() and after.masked.shape == before.masked.shape
            confidence = np.full(len(wider), np.nan)
            confidence[wider] = plain.topk_logprobs[given : given + wider.sum(), 0].float().numpy()
            given += int(wider.sum())
            length = 4 if model.family == "sdar" else len(wider)
            for part in (slice(start, start + length) for start in range(0, len(wider), length)):
                left = wider[part] & ~after.masked[part]
                assert after.masked[part].sum() == before.masked[part].sum()
                if after.masked[part].any() and left.any():
                    assert confidence[part][after.masked[part]].max() <= confidence[part][left].min()
            count = int(after.masked.sum())
            found = signals.topk_logprobs[at : at + count, 0].float().numpy()
            np.testing.assert_array_equal(found, confidence[after.masked])
            at += count
        assert any((a.masked != b.masked).any() for a, b in zip(rows, masked_anew, strict=True))
        unlike = own_signals(model, micro, replace(settings, source="none"), own.rule)
        same = own_signals(model, micro, settings, own.rule)
        assert torch.equal(same.entropy, unlike.entropy) == (source == "none")


def test_a_share_of_the_rows_is_masked_anew(model: Any) -> None:
    """The others keep their masks, and have the signals that they would have without."""
    settings = ResidualSettings(source="self", dropout=0.0, top_k=16)
    plain, some, all_ = (
        OwnSignals(model, settings, SignalRule(top_k=16), NOISE, 4, seed=1, on_policy=share)
        for share in (0.0, 0.5, 1.0)
    )
    counts = {"plain": 0, "anew": 0}
    rows = training_rows()
    made = [own(rows) for own in (plain, some, all_)]
    at = 0
    for before, mixed, anew in zip(*(trained for trained, _ in made), strict=True):
        kind = "plain" if (mixed.masked == before.masked).all() else "anew"
        count = int(mixed.masked.sum())
        assert count == before.masked.sum() and (mixed.masked == (before if kind == "plain" else anew).masked).all()
        of_kind = made[0 if kind == "plain" else 2][1]
        assert torch.equal(made[1][1][slice(at, at + count)].entropy, of_kind[slice(at, at + count)].entropy)
        counts[kind] += 1
        at += count
    assert min(counts.values()) > 0


def test_self_residual_equals_passes_written_out(model: Any) -> None:
    micro = micro_batch(model, "self")
    (far, near), masked, num_passes = micro.noisier_masks, micro.batch.masked, micro.num_passes
    assert (masked <= near).all() and (near <= far).all()
    in_sample = micro.batch.sample_ids >= 0
    assert set(num_passes[in_sample].tolist()) == {1, MAX_PASSES} and not num_passes[~in_sample].any()
    assert torch.equal(far[num_passes == 1], near[num_passes == 1])

    def residual_after(mask: torch.Tensor, residual: Any) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = masked_hidden(model, micro.batch.remasked(mask, model.mask_token_id), residual)
        signals = ReferenceSignals.from_hidden(hidden, model.lm_head_weight, 32)
        return residual_state(signals, model.embedding.weight, "normalized_entropy", None)

    with torch.no_grad():
        alpha, delta = residual_after(far, None)
        alpha, delta = (alpha * (num_passes[far] == 2))[near[far]], delta[near[far]]
        alpha, delta = residual_after(near, (alpha, delta))
        residual = alpha[masked[near]], delta[masked[near]]
        loss, statistics = LossModule(model, "inverse_t", ResidualSettings(source="self"))(micro, None)
        torch.testing.assert_close(loss, loss_sum(model, micro.batch, residual), rtol=1e-5, atol=0)
        torch.testing.assert_close(statistics[0], residual[0].sum().double(), rtol=1e-5, atol=0)
        assert abs(float(loss - loss_sum(model, micro.batch, None))) > 1e-3, "the residual changes the loss"


def test_on_policy_masks_the_least_confident_tokens(model: Any) -> None:
    micro = micro_batch(model, "on_policy")
    noisier, samples = micro.noisier_masks[-1], micro.batch.sample_ids
    batch = on_policy_batch(model, micro.batch, noisier)
    assert not (batch.masked & ~noisier).any()
    with torch.no_grad():
        hidden = masked_hidden(model, micro.batch.remasked(noisier, model.mask_token_id), None)
        confidence = torch.zeros(noisier.shape)
        confidence[noisier] = torch.softmax(model.head(hidden), -1).amax(-1)
    changed = 0
    groups = (samples + 1) * 1000 + (micro.batch.positions // 4 if model.family == "sdar" else 0)
    for row in range(len(noisier)):
        for group in groups[row][samples[row] >= 0].unique():
            inside = groups[row] == group
            masked, before = batch.masked[row] & inside, micro.batch.masked[row] & inside
            unmasked = noisier[row] & inside & ~batch.masked[row]
            assert masked.sum() == before.sum()
            if masked.any() and unmasked.any():
                assert confidence[row][masked].max() <= confidence[row][unmasked].min()
            changed += int((masked != before).sum())
    assert changed, "the masks differ from the random ones"
    assert (batch.noisy_ids[batch.masked] == model.mask_token_id).all()
    assert torch.equal(batch.noisy_ids[~batch.masked], batch.input_ids[~batch.masked])


def test_signals_and_self_residual_mixed(model: Any) -> None:
    """A share of the steps is trained as with source "self", the others as with "signals"; any rank knows which."""
    rows = [replace(row, signals=reference_rows(model, row)) for row in training_rows()]
    mixed = ResidualSettings(source="signals", dropout=0.0, self_share=0.4, top_k=16)
    own = OwnSignals(model, mixed, SignalRule(), NOISE, 4, seed=0)
    alone = replace(mixed, self_share=0.0)
    kinds = {"mixed": mixed, "signals": alone, "self": replace(alone, source="self")}
    of = {name: replace(own.collator, residual=kind) for name, kind in kinds.items()}
    losses = []
    for step in range(200):
        (micro,) = of["mixed"].micro_batches(rows, step)
        losses.append("self" if micro.noisier_masks is not None else "signals")
        assert (micro.signals is None) == (losses[-1] == "self")
        if step < 4:
            with torch.no_grad():
                found = LossModule(model, "uniform", mixed)(micro, micro.signals)[0]
                (other,) = of[losses[-1]].micro_batches(rows, step)
                plain = LossModule(model, "uniform", of[losses[-1]].residual)(other, other.signals)[0]
            assert torch.equal(found, plain)
    assert {*losses[:4]} == {"self", "signals"} and losses.count("self") == pytest.approx(80, abs=25)
    assert of["mixed"].micro_batches(rows)[0].signals is not None, "validation is on signals"
    with pytest.raises(UserError, match="self_share is 0.4"):
        replace(mixed, source="none")


def test_self_residual_on_rows_with_on_policy_masks(model: Any) -> None:
    """The noisier inputs of such a row mask at least what the row masks."""
    maker = OwnSignals(model, ResidualSettings(source="none"), SignalRule(top_k=16), NOISE, 4, seed=7, on_policy=1.0)
    rows, _ = maker(training_rows())
    own = OwnSignals(model, ResidualSettings(source="self", dropout=0.0), SignalRule(), NOISE, 4, seed=0)
    (micro,) = own.collator.micro_batches(rows)
    assert micro.noisier_masks is not None and not (micro.batch.masked & ~micro.noisier_masks).any()
    drawn = own.collator.micro_batches(training_rows())[0].batch.masked
    assert (micro.batch.masked != drawn).any(), "the rows have other masks than their draws"
    with torch.no_grad():
        loss = LossModule(model, "uniform", own.collator.residual)(micro, micro.signals)[0]
    assert torch.isfinite(loss)


def reference_rows(model: Any, row: TrainingRow) -> ReferenceSignals:
    batch, _ = collate([row], mask_token_id=model.mask_token_id, pad_token_id=0, block_length=4)
    return reference_signals(model, batch, SignalRule(top_k=16))


@pytest.mark.parametrize("source", ["self", "self_same", "on_policy"])
def test_training_without_a_reference(source: Any) -> None:
    class Fixed:
        def row(self, index: int) -> TrainingRow:
            return replace(training_rows()[index % 6], index=index)

    logged: list[dict[str, float]] = []
    settings = TrainSettings(steps=30, batch_size=6, learning_rate=3e-3, log_every=10, loss_weight="uniform")
    residual = ResidualSettings(source=source, dropout=0.0)
    model = load_model(GOLDEN / "sdar_tiny").requires_grad_(True)
    callbacks = Callbacks(logged.append, lambda step, save: None)
    with pytest.raises(UserError, match=r"residual\.source .*noise"):
        train(model, Fixed(), settings, residual, 4, callbacks)
    train(model, Fixed(), settings, residual, 4, callbacks, noise=NOISE)
    last = logged[-1]
    assert last["loss"] < 0.5 * logged[0]["loss"]
    assert (last["mean_alpha"] > 0) == (source != "on_policy")
    buckets = [v for k, v in last.items() if k.startswith("loss_p")]
    assert buckets and min(buckets) <= last["loss"] * 1.001 and max(buckets) >= last["loss"] * 0.999
    assert 0 <= last["data_wait_share"] <= 1 and last["peak_memory_gib"] > 0.05
