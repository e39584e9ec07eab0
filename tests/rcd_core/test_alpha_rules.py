"""The alpha rules that depend on the block or are trained: uniform, learned, ramp."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcd_core import Decoder, DecodeSettings, ReferenceSignals, TrainingBatch, UserError, load_model, training_loss
from rcd_core.alpha import LOGIT_MARGIN, LearnedAlpha, alpha_from_statistics, ramp_weight
from rcd_core.families.added import FILES
from rcd_core.noise import NoiseSettings, mask_example
from rcd_core.ops.residual_embedding import residual_embedding
from rcd_core.residual import inject_residual
from rcd_core.signals import residual_state, sparse_residual
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.objective import masked_blocks
from rcd_core.training.settings import ResidualSettings, TrainSettings

GOLDEN = Path(__file__).parents[1] / "golden"
ALPHA_FILE = FILES["learned_alpha"]
BLOCK = 4
NOISE = NoiseSettings()


def model(name: str = "sdar_tiny") -> Any:
    torch.set_num_threads(1)
    return load_model(GOLDEN / name).requires_grad_(True)


def untrained(learned: LearnedAlpha | None = None) -> LearnedAlpha:
    """A network with random weights in place of its initial ones."""
    learned = learned or LearnedAlpha()
    for i, weight in enumerate(learned.parameters()):
        weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    return learned


# -- uniform


@settings(max_examples=30, deadline=None, derandomize=True)
@given(groups=st.lists(st.integers(0, 4), min_size=1, max_size=30), seed=st.integers(0, 99))
def test_uniform_gives_each_block_the_weight_it_has_under_the_method(groups: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    entropy, top = torch.rand(2, len(groups), generator=generator)
    at = torch.tensor(groups) * 7  # group numbers need not be consecutive
    for scale, method in ((None, "normalized_entropy"), (0.6, "calibrated_entropy")):
        found = alpha_from_statistics("uniform", entropy, top, 11, scale, groups=at)
        plain = alpha_from_statistics(method, entropy, top, 11, scale)  # type: ignore[arg-type]
        for group in set(groups):
            mine = at == group * 7
            assert found[mine].unique().numel() == 1
            torch.testing.assert_close(found[mine].sum(), plain[mine].sum())


def batch(packed: bool = True) -> TrainingBatch:
    """Two rows of twelve; with `packed` the first holds samples of 8 and 4."""
    masked = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0]]).bool()
    sample_ids = torch.zeros(2, 12, dtype=torch.long)
    positions = torch.arange(12).repeat(2, 1)
    if packed:
        sample_ids[0, 8:], positions[0, 8:] = 1, torch.arange(4)
    ids = torch.randint(0, 490, (2, 12), generator=torch.Generator().manual_seed(0))
    return TrainingBatch(
        input_ids=ids,
        labels=ids,
        noisy_ids=torch.where(masked, 511, ids),
        masked=masked,
        p_mask=torch.full((2, 12), 0.5),
        block_length=BLOCK,
        sample_ids=sample_ids,
        positions=positions,
    )


def test_blocks_of_a_batch_are_the_blocks_of_attention() -> None:
    assert masked_blocks(model(), batch()).tolist() == [0, 0, 4, 4, 8, 8, 8, 12, 16, 16, 16, 16]
    assert masked_blocks(model("llada_tiny"), batch()).tolist() == [0, 0, 0, 0, 8, 8, 8] + [12] * 5, "whole samples"


def test_uniform_stays_within_a_block_in_training() -> None:
    """Two samples packed into one row get the alpha that they get in separate rows."""
    logits = torch.randn(12, 512, generator=torch.Generator().manual_seed(1)) * 4
    signals, target = ReferenceSignals.from_logits(logits, 8), model()
    whole = training_loss(target, batch(), signals, alpha="uniform")
    plain = training_loss(target, batch(), signals)
    alpha = alpha_from_statistics("normalized_entropy", signals.entropy, signals.entropy, 512)
    for group in masked_blocks(target, batch()).unique():
        mine = masked_blocks(target, batch()) == group
        alpha[mine] = alpha[mine].mean()
    delta = signals.soft_embedding(target.embedding.weight)
    torch.testing.assert_close(whole, training_loss(target, batch(), (alpha, delta)))
    assert not torch.isclose(whole, plain)


# -- learned


def test_learning_starts_from_the_calibrated_rule() -> None:
    share = torch.tensor([0.0, 0.2, 0.5, 1.0])
    found = LearnedAlpha()(share, torch.rand(4))
    torch.testing.assert_close(found, share.clamp(LOGIT_MARGIN, 1 - LOGIT_MARGIN))
    assert torch.equal(LearnedAlpha().hidden.weight, LearnedAlpha().hidden.weight), "the same on every worker"
    entropy = torch.tensor([0.3, 3.0])
    for scale in (None, 2.0):
        found = alpha_from_statistics("learned", entropy, torch.rand(2), 8, scale, learned=LearnedAlpha())
        want = (entropy / (scale or math.log(8))).clamp(LOGIT_MARGIN, 1 - LOGIT_MARGIN)
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("keep", [1.0, 0.0])
def test_alpha_learns_from_the_gradient_of_the_inputs(keep: float) -> None:
    """The fused operation of a training step against lookup, soft embedding and injection in fp64."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 22, (2, 7), generator=generator)
    masked = torch.rand(2, 7, generator=generator) < 0.6
    count = int(masked.sum())
    signals = ReferenceSignals.from_logits(torch.randn(count, 23, generator=generator) * 3, 4)
    table = torch.randn(23, 6, generator=generator)
    upstream = torch.randn(2, 7, 6, generator=generator)
    learned, exact = untrained(), untrained().double()

    sparse = sparse_residual(signals, 23, "learned", None, learned=learned).scaled(torch.full((count,), keep))
    residual_embedding(ids, masked, table.clone().requires_grad_(True), sparse).backward(upstream)

    embeds = table.double()[ids]
    alpha, delta = residual_state(signals, table.double(), "learned", None, learned=exact)
    inject_residual(embeds, masked, keep * alpha.double(), delta, embeds[masked]).backward(upstream.double())
    for mine, want in zip(learned.parameters(), exact.parameters(), strict=True):
        assert mine.grad is not None and want.grad is not None
        torch.testing.assert_close(mine.grad.double(), want.grad, atol=1e-5, rtol=1e-4)
        assert bool(mine.grad.any()) == bool(keep)


class Rows:
    """Eight rows of three blocks, the first block a prompt, repeated."""

    def row(self, index: int) -> TrainingRow:
        name = str(index % 8)
        ids = np.random.default_rng(index % 8).integers(0, 490, 3 * BLOCK)
        labels = np.where(np.arange(len(ids)) < BLOCK, -100, ids)
        return TrainingRow(index, name, 0, ids, labels, *mask_example(labels >= 0, name, 0, NOISE))


def trained(residual: ResidualSettings, target: Any = None, steps: int = 6, **options: Any) -> Any:
    target = target or model()
    settings = TrainSettings(steps=steps, batch_size=4, learning_rate=1e-2, log_every=steps, checkpoint_every=3)
    callbacks = Callbacks(lambda line: None, options.pop("checkpoint", lambda step, save: None))
    reference = load_model(GOLDEN / "rcd" / "sdar_ref_tiny")
    weights = train(target, Rows(), settings, residual, BLOCK, callbacks, reference=reference, noise=NOISE, **options)
    return target.with_weights(weights)


@pytest.mark.parametrize("source", ["online", "self"])
def test_the_network_is_trained_stored_and_used_in_decoding(source: Any, tmp_path: Path) -> None:
    residual = ResidualSettings(source=source, alpha="learned", alpha_scale=5.0, dropout=0.25)
    target = trained(residual)
    assert target.learned_alpha is not None
    assert not torch.equal(target.learned_alpha.out.weight, torch.zeros(1, 16)), "training changed it"
    target.info.rcd = {"alpha": "learned", "alpha_scale": 5.0}
    target.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    for mine, stored in zip(target.learned_alpha.parameters(), loaded.learned_alpha.parameters(), strict=True):
        assert torch.equal(mine, stored)

    settings = DecodeSettings(block_length=8, max_new_tokens=8, confidence_threshold=1.0, residual=True, trace=True)
    for top_k in (None, 16):
        (out,) = Decoder(loaded).generate(
            [[1, 2, 3]], DecodeSettings(**{**vars(settings), "start": "zero", "residual_top_k": top_k})
        )
        _follows(out.steps, lambda h, c: loaded.learned_alpha((h / 5.0).clamp(0, 1), c))

    plain = trained(ResidualSettings(source="online"), loaded.requires_grad_(True), steps=1)
    assert plain.learned_alpha is None, "trained further with another rule"
    plain.info.rcd = {}
    plain.save_pretrained(tmp_path)
    assert not (tmp_path / ALPHA_FILE).exists()


def _follows(steps: Any, rule: Any) -> None:
    """Each pass's alpha follows from the predictions of the pass before. No argmax here is the mask."""
    assert len(steps) > 8
    for before, after in zip(steps, steps[1:], strict=False):
        if not set(after.masked) < set(before.masked):  # another block
            continue
        with torch.no_grad():
            found = rule(torch.tensor(before.entropy), torch.tensor(before.confidence))
        made = dict(zip(before.masked, found.tolist(), strict=True))
        assert after.alpha == pytest.approx([made[p] for p in after.masked], abs=1e-5)


def test_resumed_learning_equals_uninterrupted(tmp_path: Path) -> None:
    residual = ResidualSettings(source="online", alpha="learned", dropout=0.25)
    whole = trained(residual, checkpoint=lambda step, save: save(tmp_path / str(step)))
    resumed = trained(residual, resume=tmp_path / "3")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_missing_or_damaged_network_is_named(tmp_path: Path) -> None:
    target = model()
    target.info.rcd = {"alpha": "learned"}
    target.learned_alpha = LearnedAlpha()
    target.save_pretrained(tmp_path)
    (tmp_path / ALPHA_FILE).write_bytes(b"{}")
    with pytest.raises(UserError, match=ALPHA_FILE):
        load_model(tmp_path)
    (tmp_path / ALPHA_FILE).unlink()
    with pytest.raises(UserError, match=f"rcd.alpha.*{ALPHA_FILE}"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="alpha is 'learned'"):
        Decoder(model()).generate([[1]], DecodeSettings(residual=True, alpha="learned", start="zero"))
    with pytest.raises(UserError, match="alpha is 'learned'"):
        training_loss(model(), batch(), ReferenceSignals.from_logits(torch.randn(12, 512), 8), alpha="learned")


# -- in decoding


SETTINGS: dict[str, Any] = {
    "block_length": 8,
    "max_new_tokens": 16,
    "stop_token_ids": (),
    "confidence_threshold": 1.0,
    "residual": True,
    "trace": True,
    "seed": 0,
}


def steps_of(**changes: Any) -> Any:
    decoder = Decoder(load_model(GOLDEN / "sdar_tiny"), load_model(GOLDEN / "rcd" / "sdar_ref_tiny"))
    return decoder.generate([[1, 2, 3]], DecodeSettings(**{**SETTINGS, **changes}))[0].steps


@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("start", ["zero", "reference", "dirichlet", "self"])
def test_uniform_decoding_is_the_mean_over_what_stays_masked(start: str, scale: float | None) -> None:
    steps = steps_of(alpha="uniform", alpha_scale=scale, start=start)
    plain = steps_of(alpha="calibrated_entropy" if scale else None, alpha_scale=scale, start=start)
    assert steps[0].alpha == pytest.approx([np.mean(plain[0].alpha)] * len(plain[0].alpha), abs=1e-6)
    for before, after in zip(steps, steps[1:], strict=False):
        if set(after.masked) < set(before.masked):  # of the same block
            entropy = dict(zip(before.masked, before.entropy, strict=True))
            mean = np.mean([min(1.0, entropy[p] / (scale or math.log(512))) for p in after.masked])
            assert after.alpha == pytest.approx([mean] * len(after.alpha), abs=1e-5)
    assert sum(s.alpha[0] > 0 for s in steps) > 8


def test_ramp_grows_with_the_passes_of_a_block() -> None:
    steps = steps_of(alpha="ramp", start="zero")
    lengths = [len(s.masked) for s in steps]
    blocks = [i for i, n in enumerate(lengths) if i == 0 or n > lengths[i - 1]]
    assert blocks == [0, 5, 13]  # three masks after the prompt, eight, and the rest
    for i, step in enumerate(steps):
        n = i - max(b for b in blocks if b <= i)
        assert step.alpha == pytest.approx([ramp_weight(n) if n else 0.0] * len(step.alpha))
    assert [round(ramp_weight(n), 2) for n in (1, 2, 3, 8, 9, 50)] == [0.15, 0.17, 0.19, 0.29, 0.3, 0.3]
    warm = steps_of(alpha="ramp", start="reference")
    assert warm[0].alpha == pytest.approx([0.15] * 5)


def test_residuals_of_the_reference_follow_the_rule() -> None:
    """The paper's Fig. 5: every residual comes from the reference, none from the target."""
    steps = steps_of(alpha="fixed", residual_source="reference", start="zero")
    assert all(a == pytest.approx(0.3) for step in steps for a in step.alpha)
    steps = steps_of(alpha="ramp", residual_source="reference", start="zero")
    assert [round(s.alpha[0], 2) for s in steps[5:9]] == [0.15, 0.15, 0.17, 0.19]


def test_training_refuses_the_ramp() -> None:
    with pytest.raises(UserError, match="residual.alpha is 'ramp'"):
        ResidualSettings(alpha="ramp")
    with pytest.raises(UserError, match="alpha is 'ramp'"):
        training_loss(model(), batch(), ReferenceSignals.from_logits(torch.randn(12, 512), 8), alpha="ramp")


# -- ids of the signals


def test_largest_keeps_the_signals_of_fewer_ids() -> None:
    logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)) * 3
    for mass in (None, 0.8):
        many, few = (ReferenceSignals.from_logits(logits, k, mass) for k in (40, 5))
        found = many.largest(5)
        assert torch.equal(found.topk_ids, few.topk_ids)
        torch.testing.assert_close(found.entropy, few.entropy)
        torch.testing.assert_close(found.topk_logprobs, few.topk_logprobs)
        torch.testing.assert_close(found.tail_mass, few.tail_mass, atol=2e-3, rtol=0)  # the dropped ones were fp16
    assert torch.equal(few.largest(9).topk_ids, few.topk_ids)


def test_training_uses_top_k_ids() -> None:
    few, all_of_them, again = (
        trained(ResidualSettings(source="online", top_k=k, dropout=0.0), steps=2) for k in (1, None, 32)
    )
    weights = [m.embedding.weight for m in (few, all_of_them, again)]
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    with pytest.raises(UserError, match="residual.top_k"):
        ResidualSettings(top_k=0)
