"""Loopholing: trained, stored and loaded. tests/rcd_core/test_loopholing.py has the vectors of its equations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rcd_core import Decoder, DecodeSettings, UserError, load_model
from rcd_core.families.added import FILES
from rcd_core.noise import NoiseSettings
from rcd_core.training.data.batches import collate_packed
from rcd_core.training.data.examples import ExampleSource
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.loopholing import first_states
from rcd_core.training.settings import ResidualSettings, TrainSettings
from tests.rcd_core.golden_models import GOLDEN
from tests.rcd_core.test_loopholing import EVERY, LOOPHOLING, with_loophole
from tests.rcd_core.training.helpers import write_examples


def trained(path: str, model: Any, steps: int = 60) -> tuple[list[float], Any]:
    """(losses, the trained model)."""
    losses: list[float] = []
    settings = TrainSettings(steps=steps, batch_size=4, learning_rate=3e-3, log_every=1, loss_weight="uniform")
    callbacks = Callbacks(lambda line: losses.append(line["loss"]), lambda step, save: None)
    noise = NoiseSettings(draws=1)
    rows = ExampleSource((path,), noise)
    weights = train(model, rows, settings, LOOPHOLING, 4, callbacks, noise=noise)
    return losses, model.with_weights(weights)


@pytest.mark.parametrize("name", ["sdar_tiny", "llada_tiny"])
def test_it_is_trained_stored_and_loaded(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = load_model(GOLDEN / name).requires_grad_(True)
    losses, exported = trained(write_examples(tmp_path, 4), model)
    assert losses[-1] < losses[0] / 4
    assert model.loophole is not None and model.loophole.weight.abs().max() > 1e-3
    exported.info.rcd = {"source": "loopholing", "start": "zero"}
    exported.save_pretrained(tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert all(a.equal(b) for a, b in zip(model.eval().parameters(), loaded.parameters(), strict=True))
    settings = DecodeSettings(block_length=4, max_new_tokens=8, **EVERY)
    one, other = (Decoder(m).generate([[1, 2, 3]], settings)[0] for m in (model, loaded))
    assert one.token_ids == other.token_ids and one.settings.start == "zero"
    (tmp_path / "model" / FILES["loophole"]).unlink()
    with pytest.raises(UserError, match="rcd_loophole"):
        load_model(tmp_path / "model")


def test_dropout_withholds_the_states_of_whole_samples(tmp_path: Path) -> None:
    model = with_loophole("sdar_tiny", "random")
    source = ExampleSource((write_examples(tmp_path, 3),), NoiseSettings(draws=1))
    rows = [source.row(i) for i in range(3)]
    batch, _ = collate_packed([rows[:2], rows[2:]], mask_token_id=511, pad_token_id=510, block_length=4)
    samples = batch.sample_ids[batch.masked] + 2 * torch.arange(2)[:, None].expand_as(batch.masked)[batch.masked]
    everything = first_states(model, batch, torch.ones(len(samples)))
    without = first_states(model, batch, (samples != 1).double())
    packed = batch.with_packed().packed
    assert packed is not None
    second = batch.sample_ids.gather(1, packed.source) == 1
    second[1] = False
    assert not without[second].any() and torch.equal(without[~second], everything[~second])
    assert not everything[~packed.noisy].any() and everything[second & packed.noisy & packed.valid].any()


def test_what_does_not_go_with_it_is_refused(tmp_path: Path) -> None:
    model, path = with_loophole("sdar_tiny", "random"), write_examples(tmp_path, 2)
    for name, value in {"start": "reference", "alpha": "fixed", "max_live_blocks": 2, "compat_passes": True}.items():
        with pytest.raises(UserError, match=name):
            Decoder(model).generate([[1]], DecodeSettings(residual=True, **{name: value}))
    with pytest.raises(UserError, match="alpha_scale"):
        ResidualSettings(source="loopholing", alpha_scale=2.0)
    with pytest.raises(UserError, match="Fast-dLLM v2"):
        trained(path, load_model(GOLDEN / "fastdllm_v2" / "fastdllm_v2_tiny"), steps=1)
