"""target.rounds: the target makes the signals of each further part of its training itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pipelines import precompute
from pipelines import train as train_stage
from pipelines.recipe.load import load_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.directory import StageContext, key_material
from pipelines.run.stages import stages_of
from pipelines.signals.plan import make_job as make_signal_job
from pipelines.signals.plan import rows_of
from pipelines.training.job import make_job
from rcd_core import load_model
from rcd_core.errors import UserError
from rcd_core.text.tokenizer import train_tokenizer
from rcd_core.training.data.examples import ExampleSource
from rcd_core.training.data.signal_cache import SignalSource
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.own_signals import OwnSignals
from tests.pipelines.signal_run import BLOCK, GOLDEN, context, make_recipe, prepare_run

ROUNDS = ["target.rounds=3", "target.residual.source=signals", "variants={}"]


def test_each_round_is_two_stages() -> None:
    stages = stages_of(load_recipe("sudoku-reference", ROUNDS))
    names = [name for name in stages if name.startswith(("signals", "round", "target"))]
    assert names == ["signals", "round-1", "signals-2", "round-2", "signals-3", "target"]
    assert {"signals-3", "round-2"} <= set(stages["target"].inputs) and "signals" not in stages["target"].inputs
    assert stages["signals-2"].inputs == ("prepare", "round-1") and "signals" in stages["round-1"].inputs
    assert "round-1" not in stages["evaluate"].inputs
    assert "ray" not in stages["round-1"].temporary and "ray" in stages["target"].temporary


def test_without_rounds_the_keys_are_those_of_before() -> None:
    plain = load_recipe("sudoku-reference", ["target.residual.source=signals"])
    for name in ("signals", "target"):
        material = key_material(stages_of(plain)[name], plain, {})
        assert not any("rounds" in key for key in material["recipe"])


def test_rounds_share_the_steps_and_the_rows() -> None:
    recipe = load_recipe("sudoku-reference", [*ROUNDS, "target.train.steps=100", "target.train.batch_size=8"])
    assert recipe.target.round_ends(100) == [33, 66, 100]
    ranges = [rows_of(recipe, name, 10_000) for name in ("signals", "signals-2", "signals-3")]
    assert ranges == [range(0, 264), range(264, 528), range(528, 800)]
    few = rows_of(recipe, "signals-2", 20)  # each example and draw once at most
    assert few == range(264, 264 + 20 * recipe.noise.draws)
    shared = load_recipe("sudoku-reference", [*ROUNDS[:2], "target.train.steps=100", "target.train.batch_size=8"])
    assert any(r.source == "signals" for r in shared.variants.values())
    assert rows_of(shared, "signals", 10_000) == range(800)  # a variant trains on it to the end


@pytest.mark.parametrize("changes", [["target.residual={source: self}"], ["target.train.steps=2"]])
def test_what_makes_no_sense_is_refused(changes: list[str]) -> None:
    with pytest.raises(UserError, match=r"target\.rounds is 3"):
        load_recipe("sudoku-reference", [*ROUNDS, "evaluate.starts=[zero]", "deploy.start=zero", *changes])


def run_stage(recipe: Recipe, name: str, function: Callable[[StageContext], dict[str, Any]]) -> StageContext:
    ctx = context(recipe, name)
    material = key_material(stages_of(recipe)[name], recipe, {})
    ctx.run.begin(name, material)
    ctx.run.finish(name, material, function(ctx), datetime.now(), 0.0)
    return ctx


@pytest.mark.drill  # two trainings and two caches on Ray
@pytest.mark.parametrize("on_policy", [0.0, 0.5])
def test_a_run_in_two_rounds(on_policy: float, ray_cluster: str, tmp_path: Path) -> None:
    """The same weights as in one process that goes on from the state of the first part, with signals that the first
    part's model makes from noisier versions of the rows. What has been used is removed."""
    recipe = make_recipe(tmp_path, train={"schedule": "linear"})
    target = recipe.target.model_copy(update={"rounds": 2})
    signals = recipe.signals.model_copy(update={"on_policy": on_policy})
    recipe = recipe.model_copy(update={"target": target, "signals": signals})
    prepare_run(recipe)
    prepare = Path(recipe.run_directory) / "prepare"
    train_tokenizer(["1 2 3"], 300).save_pretrained(prepare / "tokenizer")
    run_stage(recipe, "signals", precompute.run)
    first = run_stage(recipe, "round-1", train_stage.run)
    loss = first.run.manifest("round-1")["summary"]["loss"]  # type: ignore[index]
    (Path(first.directory) / "exported.json").unlink()  # as after a kill between the last checkpoint and the export
    shutil.rmtree(Path(first.directory) / "model")
    assert run_stage(recipe, "round-1", train_stage.run) and loss > 0
    assert first.run.manifest("round-1")["summary"]["loss"] == loss  # type: ignore[index]
    own = run_stage(recipe, "signals-2", precompute.run)
    summary = own.run.manifest("signals-2")["summary"]  # type: ignore[index]
    assert summary["first_row"] == 60 and summary["rows"] == 60 and summary["own"]

    files = [str(prepare / "train" / f"part-{i}.parquet") for i in (0, 1)]
    examples, job = ExampleSource(files, recipe.noise), make_signal_job(own)
    model = load_model(Path(first.directory) / "model")
    assert job.own is not None
    expected = OwnSignals(model, job.own, job.rule, job.noise, BLOCK, job.seed, on_policy)
    stored = SignalSource(own.directory, summary)
    for g in range(60, 120, 7):
        row = stored.row(g)
        assert row.example_id == examples.row(g).example_id and row.index == g
        assert row.signals is not None
        (trained,), made = expected([examples.row(g)])
        np.testing.assert_array_equal(row.masked, trained.masked)
        np.testing.assert_allclose(row.signals.entropy, made.entropy, atol=1e-4)
    kept = tmp_path / "kept"
    shutil.copytree(own.directory, kept)
    state = Path(make_job(context(recipe, "target")).resume_from or "")
    shutil.copytree(state, tmp_path / "state")

    last = run_stage(recipe, "target", train_stage.run)
    assert not list(Path(own.directory).glob("shard-*.parquet")) and not state.exists()
    assert precompute.repair(context(recipe, "signals-2")) is None, "what was removed on purpose is not damaged"
    assert precompute.repair(context(recipe, "signals")) is None
    alone = load_model(GOLDEN / "sdar_tiny").requires_grad_(True)
    silent, done = Callbacks(lambda line: None, lambda step, save: None), make_job(last)
    torch.set_num_threads(1)
    train(
        alone, SignalSource(str(kept), summary), done.settings, done.residual, BLOCK, silent, resume=tmp_path / "state"
    )
    found, start = (load_file(p / "model.safetensors") for p in (Path(last.directory) / "model", GOLDEN / "sdar_tiny"))
    for name, weight in alone.official_files()[1].items():
        changed = (weight - start[name]).norm()
        assert (weight - found[name]).norm() <= 1e-3 * changed and changed > 0, name
    assert [pq.ParquetFile(p).metadata.num_rows for p in sorted(kept.glob("shard-*.parquet"))]
    train_stage.run(context(recipe, "target"))  # as after a kill before the manifest: the model is complete
    (Path(last.directory) / "exported.json").unlink()
    with pytest.raises(UserError, match=r"goes on from .*--redo round-1"):
        train_stage.run(context(recipe, "target"))
