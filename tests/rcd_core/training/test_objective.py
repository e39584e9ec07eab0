"""training_loss, the public function: labels or prompt lengths, objects or mappings, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rcd_core import ReferenceSignals, TrainingBatch, UserError, entropy_weight, load_model, training_loss

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(params=["sdar", "llada"])
def case(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    model = load_model(GOLDEN / f"{request.param}_tiny")
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 490, (2, 16), generator=generator)
    prompts = torch.tensor([3, 6])
    answer = torch.arange(16) >= prompts[:, None]
    masked = answer & (torch.rand(ids.shape, generator=generator) < 0.6)
    batch = {
        "input_ids": ids,
        "noisy_ids": ids.masked_fill(masked, model.mask_token_id),
        "masked": masked,
        "p_mask": torch.full((2, 16), 0.6),
        "block_length": 4,
    }
    return model, {"batch": batch, "labels": torch.where(answer, ids, -100), "prompt_lengths": prompts}


def test_prompt_lengths_are_labels(case: Any) -> None:
    model, c = case
    expected = training_loss(model, TrainingBatch(labels=c["labels"], **c["batch"]))
    for batch in ({"labels": c["labels"]}, {"prompt_lengths": c["prompt_lengths"]}):
        assert torch.equal(training_loss(model, {**c["batch"], **batch}), expected)
    # LLaDA, written out: the mean of each row's mean of masked cross entropies over p.
    with torch.no_grad():
        assert expected.isfinite() and expected > 0
        if model.family == "llada":
            logp = model.logits(c["batch"]["noisy_ids"]).log_softmax(-1)
            ce = -logp.gather(2, c["batch"]["input_ids"][..., None])[..., 0] / 0.6
            rows = (ce * c["batch"]["masked"]).sum(1) / (c["labels"] >= 0).sum(1)
            torch.testing.assert_close(expected, rows.mean(), rtol=1e-5, atol=0)


def test_signals_equal_their_alpha_and_delta(case: Any) -> None:
    """k = V is the dense residual; alpha 0 is plain training; the rule matters."""
    model, c = case
    batch = {**c["batch"], "labels": c["labels"]}
    masked = batch["masked"]
    logits = torch.randn(int(masked.sum()), model.vocab_size, generator=torch.Generator().manual_seed(1))
    signals = ReferenceSignals.from_logits(logits, k=model.vocab_size)
    dense = torch.softmax(logits, -1) @ model.embedding.weight
    alpha = entropy_weight(logits)
    with torch.no_grad():
        loss = training_loss(model, batch, signals)
        torch.testing.assert_close(loss, training_loss(model, batch, (alpha, dense)), rtol=2e-3, atol=0)
        assert torch.equal(training_loss(model, batch, (alpha * 0, dense)), training_loss(model, batch))
        one = training_loss(model, batch, signals, alpha="one")
        torch.testing.assert_close(one, training_loss(model, batch, (alpha * 0 + 1, dense)), rtol=2e-3, atol=0)
        assert abs(one - loss) > 1e-3


def test_errors(case: Any) -> None:
    model, c = case
    with pytest.raises(UserError, match="labels.*prompt_lengths"):
        training_loss(model, c["batch"])
    with pytest.raises(UserError, match="masked .*-100"):
        training_loss(model, {**c["batch"], "labels": torch.full((2, 16), -100)})
    with pytest.raises(UserError, match="block_length is 0"):
        training_loss(model, {**c["batch"], "labels": c["labels"], "block_length": 0})
