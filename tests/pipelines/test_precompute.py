"""The stage `signals`: the same bytes every time, bad rows, repair, and training on its results."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipelines import precompute
from pipelines.recipe.load import dump_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.directory import RunDirectory, key_material
from pipelines.run.driver import main
from pipelines.run.stages import stages_of
from pipelines.signals import files as signal_files
from pipelines.signals import sidecars
from pipelines.signals.actor import SignalActor
from pipelines.signals.plan import (
    GROUP_BATCHES,
    make_job,
)
from pipelines.signals.summary import SignalSummary
from pipelines.training.job import check_signals
from rcd_core.errors import UserError
from rcd_core.families.loading import load_model
from rcd_core.io import storage
from rcd_core.training.data.examples import Chunks, ExampleSource
from rcd_core.training.data.signal_cache import SignalSource, noise_record
from rcd_core.training.data.signal_format import SCHEMA_VERSION
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.settings import ResidualSettings, TrainSettings
from tests.fault_table import FaultTable
from tests.pipelines.signal_run import (
    BLOCK,
    GOLDEN,
    Result,
    check_rows,
    context,
    make_recipe,
    prepare_run,
    printed,
    shards_of,
)

# -- the result


def test_rows_and_manifest(undisturbed: Result) -> None:
    ctx, summary, recipe = undisturbed.ctx, undisturbed.summary, undisturbed.ctx.recipe
    check_rows(ctx, summary)
    assert len(undisturbed.shards) > 5
    assert summary["family"] == "sdar" and summary["vocab_size"] == 512 and summary["mask_token_id"] == 511
    assert summary["reference"]["weights_sha256"] == storage.sha256(f"{recipe.reference.start}/model.safetensors")
    assert summary["noise"]["draws"] == 3 and "schedule" in summary["noise"]
    assert (summary["top_k"], summary["keep_mass"], summary["pad_multiple"]) == (8, None, BLOCK)
    assert sum(summary["entropy_histogram"]) == summary["masked_tokens"] and summary["bad_rows"] == {}
    names = [str(Path(ctx.run.stage_directory("prepare")) / "train" / n) for n in ("part-0.parquet", "part-1.parquet")]
    examples, signals = ExampleSource(names, recipe.noise), SignalSource(ctx.directory, summary)
    for g in range(1, 300, 2):  # rank 1 of 2, past the cache's end
        a, b = examples.row(g % 120), signals.row(g)
        assert (a.example_id, a.draw) == (b.example_id, b.draw) and np.array_equal(a.masked, b.masked)


@pytest.mark.drill
def test_one_actor_writes_the_bytes_of_two(undisturbed: Result, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, resources={"signal_actors": 1})
    prepare_run(recipe)
    ctx = context(recipe)
    assert precompute.run(ctx) == undisturbed.summary
    assert shards_of(ctx) == undisturbed.shards


def test_only_shards_without_a_valid_sidecar_are_computed(
    undisturbed: Result, prepared: Recipe, in_process: list[int]
) -> None:
    ctx = context(prepared)
    precompute.run(ctx)
    assert in_process == list(range(len(undisturbed.shards)))
    in_process.clear()
    directory = Path(ctx.directory)
    (directory / "shard-00000.parquet.json").unlink()
    (directory / "shard-00001.parquet").write_bytes(undisturbed.shards["shard-00001.parquet"][:-1])
    (directory / "shard-00002.parquet.json").write_text("{")
    (directory / ".shard-00003.parquet.0123abcd.tmp").write_bytes(b"half a shard of a killed actor")
    ctx = context(prepared)
    assert precompute.run(ctx) == undisturbed.summary
    assert in_process == [0, 1, 2]
    assert f"{len(undisturbed.shards) - 3} of {len(undisturbed.shards)} shards exist already" in printed(ctx)
    assert shards_of(ctx) == undisturbed.shards and not list(directory.glob(".*"))


def test_the_index_stands_for_unchanged_sidecars_only(
    prepared: Recipe, in_process: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecars, "INDEXED", 4)
    ctx = context(prepared)
    expected = precompute.run(ctx)
    directory, shards = Path(ctx.directory), len(expected["shards"])
    assert len(list(directory.glob("index-*"))) == -(-shards // 4)
    written = max(path.stat().st_mtime_ns for path in directory.glob("shard-*"))
    for number, path in enumerate(sorted(directory.glob("index-*"))):
        os.utime(path, ns=(written + 1 + number, written + 1 + number))  # file systems keep time in coarse steps
    in_process.clear()
    real, read = storage.read_json, list[str]()
    monkeypatch.setattr(storage, "read_json", lambda path: (read.append(Path(path).name), real(path))[1])

    def again() -> list[int]:
        in_process.clear()
        read.clear()
        assert precompute.run(context(prepared)) == expected
        return [int(name[6:11]) for name in read if name.startswith("shard-")]

    assert again() == [] and not in_process
    (directory / "shard-00001.parquet.json").unlink()
    os.truncate(directory / "shard-00002.parquet", 9)
    (directory / "shard-00003.parquet.json").write_text((directory / "shard-00004.parquet.json").read_text())
    (directory / "index-00000.parquet").write_bytes(b"damaged")
    assert again() == [0, 2, 3] and in_process == [1, 2, 3], "the first index had 0 to 3; 1 has no sidecar"


def test_a_row_does_not_depend_on_its_neighbours(prepared: Recipe, tmp_path: Path) -> None:
    """Alone in its batch or with longer rows: the same numbers up to rounding."""
    job = make_job(context(prepared))
    torch.set_num_threads(1)
    actor = SignalActor(job)
    rows = [actor.source.row(g) for g in range(12)]
    together = actor.batch(rows).to_pylist()
    for row, expected in zip(rows, together, strict=True):
        alone = actor.batch([row]).to_pylist()[0]
        assert alone["topk_ids"] == expected["topk_ids"] and alone["masked_positions"] == expected["masked_positions"]
        assert alone["topk_logprobs"] == pytest.approx(expected["topk_logprobs"], abs=4e-3)
        assert alone["entropy"] == pytest.approx(expected["entropy"], abs=1e-5)
        assert alone["tail_mass"] == pytest.approx(expected["tail_mass"], abs=1e-5)


def test_an_actor_exchanges_sidecars_and_holds_one_group_of_rows(prepared: Recipe) -> None:
    actor = SignalActor(make_job(context(prepared)))
    answer = actor({"shard": np.array([1])})
    assert list(answer) == ["shard", "sidecar"] and answer["shard"] == np.array([1])
    assert json.loads(answer["sidecar"][0]) == storage.read_json(f"{actor.job.directory}/shard-00001.parquet.json")
    sizes = [len(rows) for rows, _ in actor.tables(range(120))]
    assert sum(sizes) == 120 and max(sizes) <= GROUP_BATCHES * 64 / (2 * BLOCK)


# -- bad rows


def poison(i: int, example: dict[str, Any]) -> dict[str, Any]:
    change: dict[int, dict[str, Any]] = {
        3: {"input_ids": [1] * 1028, "labels": [1] * 1028},
        20: {"input_ids": [], "labels": []},
        45: {"input_ids": [7777] * 8, "labels": [1] * 8},
        59: {"input_ids": None},
    }
    return {**example, **change.get(i, {})}


def test_bad_rows_are_listed_and_skipped(tmp_path: Path, in_process: list[int]) -> None:
    recipe = make_recipe(tmp_path, signals={"max_bad_rows": 0.2})
    prepare_run(recipe, poison)
    ctx = context(recipe)
    summary = precompute.run(ctx)
    assert summary["bad_rows"] == {"empty": 4, "id outside the vocabulary": 2, "too long for the model's positions": 2}
    side = pq.read_table(Path(ctx.directory) / signal_files.BAD_ROWS).to_pylist()
    assert Counter(r["example_id"] for r in side) == {"0003": 2, "0020": 2, "0045": 2, "0059": 2}
    assert "bad rows: 4 x empty" in printed(ctx) and signal_files.BAD_ROWS in printed(ctx)
    source = SignalSource(ctx.directory, summary)
    rows = [source.row(g) for g in range(120)]
    assert {(r.index, r.reason) for r in rows if r.reason} == {(r["row"], r["reason"]) for r in side}
    assert sum(int(r.masked.sum()) for r in rows) == summary["masked_tokens"]
    model = load_model(recipe.target.start)  # the training skips them
    settings = TrainSettings(steps=30, batch_size=4, learning_rate=1e-3, log_every=30)
    logged: list[Any] = []
    residual = ResidualSettings(source="signals", dropout=0.0)
    train(model, source, settings, residual, BLOCK, Callbacks(logged.append, lambda step, save: None))
    assert np.isfinite(logged[-1]["loss"])


def test_too_many_bad_rows_fail(tmp_path: Path, in_process: list[int]) -> None:
    recipe = make_recipe(tmp_path, signals={"max_bad_rows": 0.02})
    prepare_run(recipe, poison)
    with pytest.raises(UserError) as caught:
        precompute.run(context(recipe))
    message = str(caught.value)
    assert "of 120 rows cannot be used, more than signals.max_bad_rows (0.02) allows" in message
    assert signal_files.BAD_ROWS in message and "raise signals.max_bad_rows" in message
    assert "signals.max_bad_rows" not in key_material(stages_of(recipe)["signals"], recipe, {})["recipe"]
    num_computed = len(in_process)
    summary = precompute.run(context(make_recipe(tmp_path, signals={"max_bad_rows": 0.2})))
    assert len(in_process) == len(summary["shards"]) > num_computed, "no shard was computed twice"


# -- repair


def test_repair_computes_only_damaged_shards(prepared: Recipe, in_process: list[int]) -> None:
    ctx = context(prepared)
    with pytest.raises(UserError, match="--repair: .* has no manifest"):
        precompute.repair(ctx)
    summary = precompute.run(ctx)
    whole = shards_of(ctx)
    storage.write_json(f"{ctx.directory}/manifest.json", {"summary": summary})
    assert precompute.repair(ctx) is None and "0 to compute again" in printed(ctx)
    in_process.clear()
    flipped = bytearray(whole["shard-00001.parquet"])
    flipped[len(flipped) // 2] ^= 1
    Path(ctx.directory, "shard-00001.parquet").write_bytes(flipped)
    Path(ctx.directory, "shard-00003.parquet").unlink()
    with pytest.raises(UserError, match=r"shard-00001\.parquet is damaged \(its sha256"):
        list(map(SignalSource(ctx.directory, summary).row, range(120)))
    ctx = context(prepared)
    assert precompute.repair(ctx) == summary and shards_of(ctx) == whole and in_process == [1, 3]
    assert "shard-00001.parquet is damaged: its sha256 is" in printed(ctx)
    assert "shard-00003.parquet is damaged: it is missing" in printed(ctx)


@pytest.mark.faults("a corrupted shard", "signals")
def test_repair_from_the_command_line_keeps_the_key(
    ray_cluster: str,
    prepared: Recipe,
    in_process: list[int],
    capsys: pytest.CaptureFixture[str],
    fault_table: FaultTable,
) -> None:
    path = Path(prepared.storage, "recipe.yaml")
    path.write_text(dump_recipe(prepared))
    command = ["--recipe", str(path), "--stages", "signals"]
    assert main([*command, "--repair"]) == 2
    assert "--repair: stage signals" in capsys.readouterr().err
    assert main(["--recipe", str(path), "--stages", "prepare", "--repair"]) == 2
    assert "--repair: only stage signals" in capsys.readouterr().err
    assert main(command) == 0 and in_process
    in_process.clear()
    run = RunDirectory(prepared.run_directory)
    before = run.manifest("signals")
    assert main([*command, "--repair"]) == 0 and not in_process
    Path(prepared.run_directory, "signals", "shard-00002.parquet").write_bytes(b"damaged")
    assert main(command) == 0 and not in_process, "a finished stage is not checked without --repair"
    assert main([*command, "--repair"]) == 0 and in_process == [2]
    assert run.manifest("signals") == before
    assert "1 to compute again" in capsys.readouterr().out
    fault_table.add("a training stops and names the shard; --repair computes it again", "the same manifest")


# -- training


@pytest.mark.parametrize("keep_mass", [None, 0.02], ids=["fixed k", "adaptive k"])
def test_cached_signals_train_as_the_online_ones(keep_mass: float | None, tmp_path: Path) -> None:
    """Same loss and gradients, up to the rounding of stored log-probabilities and of other batches."""
    recipe = make_recipe(tmp_path, signals={"keep_mass": keep_mass, "alpha_temperature": 0.8, "delta_temperature": 1.1})
    prepare_run(recipe)
    ctx = context(recipe)
    job = make_job(ctx)
    torch.set_num_threads(1)
    actor = SignalActor(job)
    summary = SignalSummary(ctx, job)
    for shard in range(job.num_shards):
        summary.add(shard, actor.compute(shard))
    cached = SignalSource(ctx.directory, summary.manifest())
    online = ExampleSource(job.examples, job.noise, job.chunks)
    settings = TrainSettings(steps=1, batch_size=40, learning_rate=1e-3, log_every=1, clip_norm=1e9)
    gradients, losses = [], []
    for source, kind in ((cached, "signals"), (online, "online")):
        model = load_model(recipe.target.start)
        logged: list[Any] = []
        seen: list[torch.Tensor] = []
        model.embedding.weight.register_hook(lambda g, seen=seen: seen.append(g.clone()))
        residual = ResidualSettings(source=kind, dropout=0.0)  # type: ignore[arg-type]
        callbacks = Callbacks(logged.append, lambda step, save: None)
        rule = recipe.signals.rule
        train(model, source, settings, residual, BLOCK, callbacks, reference=actor.model, signal_rule=rule)
        gradients.append(seen[0])
        losses.append((logged[0]["loss"], logged[0]["mean_alpha"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-3, atol=2e-3 * float(gradients[1].abs().max()))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_length", 8),
        ("pad_multiple", 12),
        ("mask_token_id", 3),
        ("tokenizer_sha256", "1" * 64),
        ("noise", {"seed": 5}),
        ("schema_version", 1),
    ],
)
def test_a_training_refuses_signals_of_other_settings(field: str, value: Any, prepared: Recipe) -> None:
    ctx = context(prepared, "target")
    job = make_job(context(prepared))
    summary = {
        "schema_version": SCHEMA_VERSION,
        "block_length": BLOCK,
        "pad_multiple": BLOCK,
        "mask_token_id": 511,
        "tokenizer_sha256": "0" * 64,
        "noise": noise_record(job.noise),
    }
    check_signals(ctx, summary)
    with pytest.raises(UserError) as caught:
        check_signals(ctx, {**summary, field: value})
    assert f"the signals' {field} is {value!r} but" in str(caught.value) and "--redo signals" in str(caught.value)


def test_the_key_of_an_online_target_contains_the_rule(tmp_path: Path) -> None:
    """top_k belongs to the target's key if signals are online, otherwise to the key of the cache."""
    online = {"source": "online", "alpha": "normalized_entropy"}
    start = str(GOLDEN / "sdar_tiny")
    target = {"start": start, "train": {"steps": 1, "batch_size": 1}, "residual": online}
    for changed, expected in (({"target": target}, True), ({}, False)):
        recipe = make_recipe(tmp_path, **changed)
        material = key_material(stages_of(recipe)["target"], recipe, {})
        assert ("signals.top_k" in material["recipe"]) is expected
    assert Chunks.from_manifest({"file": [0, 0, 1], "rows": [1, 2, 3]}).group == (0, 1, 0)
