"""Eq. 1-3 and the alpha rules against cases computed by hand; training noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcd_core import UserError, entropy_weight, inject_residual, soft_embedding
from rcd_core.alpha import alpha_from_statistics
from rcd_core.calibration.entropy_histogram import MAX_NATS, NUM_BINS, entropy_histogram, entropy_quantile
from rcd_core.noise import NoiseSettings, mask_example
from rcd_core.training.settings import ResidualSettings

UNIFORM, CERTAIN = torch.zeros(1, 8), torch.tensor([[60.0] + [0.0] * 7])


def test_alpha_is_one_for_uniform_and_zero_for_certain_predictions() -> None:
    assert entropy_weight(UNIFORM).item() == pytest.approx(1.0)
    assert entropy_weight(CERTAIN).item() == pytest.approx(0.0, abs=1e-6)
    half = torch.tensor([[0.0, 0.0] + [-math.inf] * 6])
    assert entropy_weight(half).item() == pytest.approx(math.log(2) / math.log(8))
    assert entropy_weight(half, "calibrated_entropy", alpha_scale=0.5).item() == 1.0, "clipped at 1"
    assert entropy_weight(half, "inverse_entropy").item() == pytest.approx(1 - math.log(2) / math.log(8))
    assert entropy_weight(half, "confidence").item() == pytest.approx(0.5)
    assert entropy_weight(half, "fixed").item() == pytest.approx(0.3)


def test_temperature_raises_alpha() -> None:
    z = torch.randn(5, 8)
    assert (entropy_weight(z, temperature=2.0) > entropy_weight(z)).all()


def test_injection_touches_only_the_mask() -> None:
    embeds, mask = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 1] = mask[1, 3] = True
    alpha, delta, mask_embedding = torch.tensor([0.25, 0.0]), torch.randn(2, 4), torch.randn(4)
    out = inject_residual(embeds, mask, alpha, delta, mask_embedding)
    assert torch.equal(out[~mask], embeds[~mask])
    torch.testing.assert_close(out[0, 1], 0.75 * mask_embedding + 0.25 * delta[0])
    assert torch.equal(out[1, 3], mask_embedding), "alpha = 0 is the mask embedding, bit for bit"


def test_soft_embedding_of_a_certain_token_is_its_embedding() -> None:
    table = torch.randn(8, 4)
    torch.testing.assert_close(soft_embedding(torch.eye(8), table), table)


def test_bad_rules_are_named() -> None:
    with pytest.raises(ValueError, match="alpha is 'entropy'"):
        alpha_from_statistics("entropy", torch.ones(1), torch.ones(1), 8)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="alpha_scale"):
        alpha_from_statistics("calibrated_entropy", torch.ones(1), torch.ones(1), 8)
    with pytest.raises(UserError, match="residual.dropout"):
        ResidualSettings(dropout=1.5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(length=st.integers(1, 40), seed=st.integers(0, 5), draw=st.integers(0, 3), data=st.data())
def test_noise_is_a_function_of_its_key(length: int, seed: int, draw: int, data: st.DataObject) -> None:
    maskable = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    maskable[0] = True
    noise = NoiseSettings(seed=seed)
    masked, p = mask_example(maskable, "row", draw, noise)
    again, q = mask_example(maskable, "row", draw, noise)
    assert np.array_equal(masked, again) and np.array_equal(p, q)
    assert masked.any() and not (masked & ~maskable).any() and noise.eps <= p[0] <= 1 and (p == p[0]).all()


def test_noise_has_the_right_share_and_differs_by_draw() -> None:
    """The share masked is p on average, p is uniform, and draws and examples are independent."""
    maskable = np.ones(64, dtype=bool)
    rows = [mask_example(maskable, f"{i}", 0, NoiseSettings()) for i in range(2000)]
    assert np.mean([p for _, p in rows]) == pytest.approx(0.5, abs=0.02)
    assert np.mean([m.mean() - p for m, p in rows]) == pytest.approx(0.0, abs=0.01)
    other, _ = mask_example(maskable, "0", 1, NoiseSettings())
    assert not np.array_equal(rows[0][0], other)


def test_noise_per_block_has_one_probability_in_each_block() -> None:
    maskable, noise = np.ones(30, dtype=bool), NoiseSettings(block_length=8)
    rows = [mask_example(maskable, f"{i}", 0, noise) for i in range(2000)]
    for _, p in rows[:5]:
        assert [len(set(p[i : i + 8])) for i in range(0, 30, 8)] == [1, 1, 1, 1] and len(set(p)) == 4
    first, second = (np.array([p[i] for _, p in rows]) for i in (0, 29))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1, "blocks are independent"
    assert np.mean([m - p for m, p in rows], axis=0) == pytest.approx(np.zeros(30), abs=0.05)
    with pytest.raises(UserError, match="noise.block_length"):
        NoiseSettings(block_length=0)


def test_an_example_without_labels_raises() -> None:
    with pytest.raises(UserError, match="'x'"):
        mask_example(np.zeros(4, dtype=bool), "x", 0, NoiseSettings())


def test_entropy_quantile_follows_the_sample() -> None:
    sample = np.random.default_rng(0).gamma(2.0, 0.5, 20_000).astype(np.float32)
    histogram = entropy_histogram(sample).tolist()
    for q in (0.5, 0.95, 0.999):
        assert entropy_quantile(histogram, q) == pytest.approx(
            float(np.quantile(sample, q)), abs=2 * MAX_NATS / NUM_BINS
        )
    with pytest.raises(UserError, match="histogram"):
        entropy_quantile([0] * NUM_BINS, 0.5)
