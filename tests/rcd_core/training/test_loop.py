"""The training loop: resumed = uninterrupted, any number of workers, cached = online, full dropout = plain."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rcd_core import UserError, load_model
from rcd_core.noise import NoiseSettings
from rcd_core.training.data.batches import collate
from rcd_core.training.data.examples import ExampleSource, Limits
from rcd_core.training.data.rows import TrainingRow
from rcd_core.training.disk import checkpoint_bytes
from rcd_core.training.loop import Callbacks, learning_rate, train
from rcd_core.training.objective import reference_signals
from rcd_core.training.plan import ModelShape
from rcd_core.training.settings import ResidualSettings, SignalRule, TrainSettings
from tests.rcd_core.training.helpers import BLOCK, GOLDEN, spawn, write_examples

PLAIN = ResidualSettings(source="none", dropout=0.0)
SETTINGS = TrainSettings(steps=8, batch_size=6, learning_rate=1e-3, schedule="cosine", log_every=4, checkpoint_every=3)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_examples(tmp_path_factory.mktemp("examples"), 20)


def run(
    examples: str, family: str = "sdar", residual: ResidualSettings = PLAIN, **options: Any
) -> tuple[Any, list[Any]]:
    torch.set_num_threads(1)
    model = load_model(GOLDEN / f"{family}_tiny")
    logged: list[Any] = []
    source = options.pop("source", None) or ExampleSource([examples], NoiseSettings(draws=2))
    settings = options.pop("settings", SETTINGS)
    checkpoint, loaded = options.pop("checkpoint", lambda step, save: None), options.pop("loaded", lambda: None)
    train(model, source, settings, residual, BLOCK, Callbacks(logged.append, checkpoint, loaded), **options)
    return model, logged


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_training_lowers_the_loss_and_logs(examples: str) -> None:
    settings = TrainSettings(steps=60, batch_size=20, learning_rate=3e-3, loss_weight="uniform", log_every=20)
    _, logged = run(examples, settings=settings)
    assert [line["step"] for line in logged] == [20, 40, 60]
    assert logged[-1]["loss"] < 0.7 * logged[0]["loss"]


def test_a_training_in_two_parts_is_the_whole_one(examples: str, tmp_path: Path) -> None:
    """With rates of the whole schedule, and a checkpoint at the end of the first part, which may go once it is
    loaded, and is as large as planned."""
    saved: list[int] = []

    def checkpoint(step: int, save: Any) -> None:
        saved.append(step)
        save(tmp_path / str(step))

    whole, _ = run(examples)
    run(examples, stop_at=4, checkpoint=checkpoint)
    assert saved == [3, 4]
    shape = ModelShape.of_backbone("sdar", load_model(GOLDEN / "sdar_tiny").config)
    planned = checkpoint_bytes(shape, SETTINGS)
    written = sum(path.stat().st_size for path in (tmp_path / "4").rglob("*"))
    assert planned < written < planned + 300_000, "with names and indices"
    rest, logged = run(examples, resume=tmp_path / "4", loaded=lambda: shutil.rmtree(tmp_path / "4"))
    assert not (tmp_path / "4").exists()
    assert equal(whole, rest) and [line["step"] for line in logged] == [8]


def test_steps_of_the_warm_up_have_smaller_blocks(examples: str) -> None:
    """Four of one token and four of two, whether blocks would grow to four tokens or stay at two."""
    warm, _ = run(examples, block_warmup=1.0)
    other = load_model(GOLDEN / "sdar_tiny")
    source, nothing = ExampleSource([examples], NoiseSettings(draws=2)), Callbacks(lambda _: None, lambda *_: None)
    train(other, source, SETTINGS, PLAIN, 2, nothing, block_warmup=0.5)
    assert BLOCK == 4 and equal(warm, other) and not equal(warm, run(examples)[0])


@pytest.mark.parametrize("residual", [PLAIN, ResidualSettings(source="online")], ids=["plain", "rcd"])
def test_resumed_equals_uninterrupted(examples: str, tmp_path: Path, residual: ResidualSettings) -> None:
    """Equal tensors, not close ones. The checkpoint of step 6 (36 rows) is past an epoch of 20 rows."""
    reference = load_model(GOLDEN / "rcd" / "sdar_ref_tiny")
    whole, lines = run(examples, residual=residual, reference=reference)
    run(examples, residual=residual, reference=reference, checkpoint=lambda step, save: save(tmp_path / str(step)))
    resumed, later = run(examples, residual=residual, reference=reference, resume=tmp_path / "6")
    assert sorted(os.listdir(tmp_path)) == ["3", "6"]
    assert equal(whole, resumed)
    assert later[-1]["step"] == lines[-1]["step"] == 8


def test_accumulation_changes_rounding_only(examples: str) -> None:
    whole, _ = run(examples)
    settings = replace(SETTINGS, micro_batch_size=2)
    parts, _ = run(examples, settings=settings)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


EIGHT = replace(SETTINGS, batch_size=8)  # divides among two and four workers


def _worker(rank: int, examples: str, out: Path) -> None:
    model, _ = run(examples, settings=EIGHT)
    if rank == 0:
        torch.save(model.state_dict(), out)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.drill)])
def test_any_number_of_workers_trains_the_same_model(world: int, examples: str, tmp_path: Path) -> None:
    spawn(_worker, world, examples, tmp_path / "several.pt")
    several = torch.load(tmp_path / "several.pt", weights_only=True)
    one, _ = run(examples, settings=EIGHT)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(several[name], tensor, atol=2e-5, rtol=1e-4)


class Cached:
    """Rows with signals attached, as the cache on disk gives them."""

    def __init__(self, source: ExampleSource, reference: Any) -> None:
        self.source, self.reference, self.rule = source, reference, SignalRule()

    def row(self, index: int) -> TrainingRow:
        row = self.source.row(index)
        ids = {"mask_token_id": self.reference.mask_token_id, "pad_token_id": 500, "block_length": BLOCK}
        batch, _ = collate([row], **ids)
        return replace(row, signals=reference_signals(self.reference, batch, self.rule))


@pytest.mark.parametrize("family", ["sdar", "llada"])
def test_cached_signals_equal_online(examples: str, family: str) -> None:
    """Neighbours and padding do not change signals: computed row by row, or in the step's own padded batch."""
    reference = load_model(GOLDEN / "rcd" / f"{family}_ref_tiny")
    before = copy.deepcopy(reference.state_dict())
    online, _ = run(examples, family, ResidualSettings(source="online", dropout=0.25), reference=reference)
    source = Cached(ExampleSource([examples], NoiseSettings(draws=2)), reference)
    cached, _ = run(examples, family, ResidualSettings(source="signals", dropout=0.25), source=source)
    for a, b in zip(online.parameters(), cached.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-2)  # eight Adam steps over fp16 log-probabilities
    after = reference.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before), "the reference's weights never change"


def test_full_dropout_is_plain_training(examples: str) -> None:
    reference = load_model(GOLDEN / "rcd" / "sdar_ref_tiny")
    plain, _ = run(examples)
    dropped, _ = run(examples, residual=ResidualSettings(source="online", dropout=1.0), reference=reference)
    for a, b in zip(plain.parameters(), dropped.parameters(), strict=True):
        # Not equal: the mask embedding's gradient is summed in another order.
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    target, lines = run(examples, residual=ResidualSettings(source="online", dropout=0.0), reference=reference)
    assert not equal(plain, target)
    assert 0.0 < lines[-1]["mean_alpha"] < 1.0


def test_an_untrained_batch_is_overfitted_with_residual_inputs(examples: str) -> None:
    reference = load_model(GOLDEN / "rcd" / "sdar_ref_tiny")
    settings = TrainSettings(steps=150, batch_size=4, learning_rate=5e-3, loss_weight="uniform", log_every=50)

    class OneBatch(ExampleSource):
        def row(self, index: int) -> TrainingRow:
            return super().row(index % 4)

    source = OneBatch([examples], NoiseSettings(draws=1))
    residual = ResidualSettings(source="online", dropout=0.0)
    _, logged = run(examples, residual=residual, reference=reference, settings=settings, source=source)
    assert logged[-1]["loss"] < 0.1


@pytest.mark.parametrize(
    ("changes", "residual", "message"),
    [
        ({"learning_rate": 1e30, "warmup": 0.0}, PLAIN, r"step \d+ .*train\.max_skipped_steps"),
        ({}, ResidualSettings(source="online"), r"residual\.source is 'online'"),
        ({}, ResidualSettings(source="signals"), r"residual\.source is 'signals'"),
    ],
)
def test_errors_name_the_step_or_the_setting(
    changes: dict[str, Any], residual: ResidualSettings, message: str, examples: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(examples, residual=residual, settings=TrainSettings(**{"steps": 40, "batch_size": 6, **changes}))


def test_schedules() -> None:
    s = TrainSettings(steps=100, batch_size=1, learning_rate=1.0, warmup=0.1)
    assert learning_rate(0, s) == pytest.approx(0.1)
    assert learning_rate(50, s) == 1.0
    cosine, linear = replace(s, schedule="cosine"), replace(s, schedule="linear")
    assert learning_rate(55, cosine) == learning_rate(55, linear) == pytest.approx(0.5)
    assert learning_rate(99, linear) == pytest.approx(1 / 90)


def test_a_step_without_a_row_to_train_on_says_why(examples: str) -> None:
    source = ExampleSource([examples], NoiseSettings(), limits=Limits(vocab_size=512, max_positions=2))
    with pytest.raises(UserError, match="none of the rows of step 0 can be trained on: too long for the model's"):
        run(examples, source=source)
