"""The stage `signals`: planned before it is computed, the same bytes every time, and what the trainer makes of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipelines import precompute
from pipelines.recipe.load import dump_recipe, load_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.directory import RunDirectory, key_material
from pipelines.run.driver import main
from pipelines.run.stages import stages_of
from pipelines.signals import files as signal_files
from pipelines.signals.actor import SignalActor
from pipelines.signals.plan import (
    GROUP_BATCHES,
    groups,
    make_job,
    plan_batches,
    plan_shards,
    planned_rows,
    predicted_bytes,
)
from pipelines.signals.summary import SignalSummary
from pipelines.training.job import check_signals
from rcd_core.errors import UserError
from rcd_core.families.loading import load_model
from rcd_core.io import storage
from rcd_core.residual import ResidualSettings
from rcd_core.training.data.examples import Chunks, ExampleSource
from rcd_core.training.data.rows import RowOrder, TrainingRow
from rcd_core.training.data.signal_cache import SignalSource, noise_record
from rcd_core.training.data.signal_format import SCHEMA_VERSION
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.settings import TrainSettings
from tests.fault_table import FaultTable
from tests.pipelines.signal_run import BLOCK, GOLDEN, Result, check_rows, context, prepared, recipe, said, shards_of

# -- the plan


def test_the_plan_is_made_of_the_recipe_and_the_manifest_alone(tmp_path: Path) -> None:
    """Nothing is there but the manifest; equal shards, about as large as asked for, no row left out."""
    made = recipe(tmp_path, train={"steps": 500, "batch_size": 8})
    rows = [1024] * 40 + [100]
    prepare = {"vocab_size": 151_643, "chunks": {"rows": rows, "tokens": [r * 800 for r in rows]}}
    prepare["chunks"]["labelled"] = [r * 500 for r in rows]
    one = predicted_bytes(1, 800, 500, vocab_size=151_643, top_k=8)
    for shard_mb in (1, 7.5, 1000):
        sized = made.model_copy(update={"signals": made.signals.model_copy(update={"shard_mb": shard_mb})})
        offsets = plan_shards(sized, prepare)
        assert offsets[0] == 0 and offsets[-1] == 4000 == planned_rows(made, sum(rows))
        sizes = np.diff(offsets)
        assert len(sizes) == -(-4000 * one // int(shard_mb * 1e6)), "as few as the size allows"
        assert sizes.min() >= sizes.max() - 1
        assert plan_shards(sized, prepare) == offsets


def test_shards_of_uneven_chunks_weigh_the_same(tmp_path: Path) -> None:
    made = recipe(tmp_path, train={"steps": 500, "batch_size": 4}, signals={"shard_mb": 0.05})
    rows = [100] * 10
    tokens = [100 * 8 * (1 + i) for i in range(10)]
    prepare = {"vocab_size": 512, "chunks": {"rows": rows, "tokens": tokens, "labelled": tokens}}
    offsets = plan_shards(made, prepare)
    order = RowOrder(rows, made.noise)
    weight = [predicted_bytes(1, t // 100, t // 100, vocab_size=512, top_k=8) for t in tokens]
    sizes = [sum(weight[order.locate(g)[0]] for g in range(a, b)) for a, b in zip(offsets, offsets[1:], strict=False)]
    assert max(sizes) <= 0.05e6 + max(weight) and max(sizes) - min(sizes) <= 2 * max(weight)
    assert max(np.diff(offsets)) > 2 * min(np.diff(offsets)), "unequal numbers of rows"


def test_draws_are_independent_of_epochs(tmp_path: Path) -> None:
    """Never more rows than examples x draws, however long the targets train; a variant does not add any."""
    assert planned_rows(recipe(tmp_path, train={"steps": 1000}), 60) == 3 * 60
    assert planned_rows(recipe(tmp_path, train={"steps": 10}, variants={"other": {}}), 60) == 40


def test_batches_keep_to_their_budget_and_sort_by_length() -> None:
    lengths = [40, 8, 16, 40, 8, 100, 12]
    batches = plan_batches(lengths, 48)
    assert sorted(i for b in batches for i in b) == list(range(7))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 48 for b in batches)
    assert batches[0] == [1, 4, 6] and batches[-1] == [5], "what is above the budget goes alone"
    none = np.zeros(0)
    rows = [TrainingRow(i, "", 0, np.zeros(n), none, none, np.ones(n)) for i, n in enumerate([30] * 40)]
    found = list(groups(rows, 48))
    assert [r.index for g in found for r in g] == list(range(40))
    assert all(sum(len(r.input_ids) for r in g) <= GROUP_BATCHES * 48 for g in found)


def test_the_demo_has_shards_for_both_its_actors() -> None:
    demo = load_recipe("demo")
    rows = [1024] * 32
    chunks = {"rows": rows, "tokens": [37 * r for r in rows], "labelled": [24 * r for r in rows]}
    offsets = plan_shards(demo, {"vocab_size": 271, "chunks": chunks})
    assert (len(offsets) - 1) % demo.resources.signal_actors == 0 and 4 <= len(offsets) - 1 <= 20


# -- the result


def test_rows_and_manifest(undisturbed: Result) -> None:
    ctx, summary, made = undisturbed.ctx, undisturbed.summary, undisturbed.ctx.recipe
    check_rows(ctx, summary)
    assert len(undisturbed.shards) > 5
    assert summary["family"] == "sdar" and summary["vocab_size"] == 512 and summary["mask_token_id"] == 511
    assert summary["reference"]["weights_sha256"] == storage.sha256(f"{made.reference.start}/model.safetensors")
    assert summary["noise"]["draws"] == 3 and "schedule" in summary["noise"]
    assert (summary["top_k"], summary["keep_mass"], summary["pad_multiple"]) == (8, None, BLOCK)
    assert sum(summary["entropy_histogram"]) == summary["masked_tokens"] and summary["bad_rows"] == {}
    names = [str(Path(ctx.run.stage_directory("prepare")) / "train" / n) for n in ("part-0.parquet", "part-1.parquet")]
    examples, signals = ExampleSource(names, made.noise), SignalSource(ctx.directory, summary)
    for g in range(1, 300, 2):  # rank 1 of 2, past the cache's end
        a, b = examples.row(g % 120), signals.row(g)
        assert (a.example_id, a.draw) == (b.example_id, b.draw) and np.array_equal(a.masked, b.masked)


def test_one_actor_writes_what_two_write(undisturbed: Result, tmp_path: Path) -> None:
    made = recipe(tmp_path, resources={"signal_actors": 1})
    prepared(made)
    ctx = context(made)
    assert precompute.run(ctx) == undisturbed.summary
    assert shards_of(ctx) == undisturbed.shards


def test_only_what_has_no_valid_sidecar_is_computed(undisturbed: Result, made: Recipe, in_process: list[int]) -> None:
    ctx = context(made)
    precompute.run(ctx)
    assert in_process == list(range(len(undisturbed.shards))), "and a third time the same bytes, without Ray"
    in_process.clear()
    directory = Path(ctx.directory)
    (directory / "shard-00000.parquet.json").unlink()
    (directory / "shard-00001.parquet").write_bytes(undisturbed.shards["shard-00001.parquet"][:-1])
    (directory / "shard-00002.parquet.json").write_text("{")
    (directory / ".shard-00003.parquet.0123abcd.tmp").write_bytes(b"half a shard of a killed actor")
    ctx = context(made)
    assert precompute.run(ctx) == undisturbed.summary
    assert in_process == [0, 1, 2]
    assert f"{len(undisturbed.shards) - 3} of {len(undisturbed.shards)} shards exist already" in said(ctx)
    assert shards_of(ctx) == undisturbed.shards and not list(directory.glob(".*"))


def test_a_row_does_not_depend_on_its_neighbours(made: Recipe, tmp_path: Path) -> None:
    """Alone in its batch or among longer ones: the same numbers up to rounding."""
    job = make_job(context(made))
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


def test_an_actor_gets_and_gives_numbers_and_holds_a_group_of_rows(made: Recipe) -> None:
    actor = SignalActor(make_job(context(made)))
    answer = actor({"shard": np.array([1])})
    assert answer == {"shard": np.array([1])}
    held = [len(rows) for rows, _ in actor.tables(range(120))]
    assert sum(held) == 120 and max(held) <= GROUP_BATCHES * 64 / (2 * BLOCK)


# -- poison


def poison(i: int, example: dict[str, Any]) -> dict[str, Any]:
    change: dict[int, dict[str, Any]] = {
        3: {"input_ids": [1] * 1028, "labels": [1] * 1028},
        20: {"input_ids": [], "labels": []},
        45: {"input_ids": [7777] * 8, "labels": [1] * 8},
        59: {"input_ids": None},
    }
    return {**example, **change.get(i, {})}


def test_poisoned_examples_go_to_a_side_table(tmp_path: Path, in_process: list[int]) -> None:
    made = recipe(tmp_path, signals={"max_bad_rows": 0.2})
    prepared(made, poison)
    ctx = context(made)
    summary = precompute.run(ctx)
    assert summary["bad_rows"] == {"empty": 4, "id outside the vocabulary": 2, "too long for the model's positions": 2}
    side = pq.read_table(Path(ctx.directory) / signal_files.BAD_ROWS).to_pylist()
    assert Counter(r["example_id"] for r in side) == {"0003": 2, "0020": 2, "0045": 2, "0059": 2}
    assert "bad rows: 4 x empty" in said(ctx) and signal_files.BAD_ROWS in said(ctx)
    source = SignalSource(ctx.directory, summary)
    rows = [source.row(g) for g in range(120)]
    assert {(r.index, r.reason) for r in rows if r.reason} == {(r["row"], r["reason"]) for r in side}
    assert sum(int(r.masked.sum()) for r in rows) == summary["masked_tokens"]
    model = load_model(made.target.start)  # and the trainer passes over them
    settings = TrainSettings(steps=30, batch_size=4, learning_rate=1e-3, log_every=30)
    logged: list[Any] = []
    residual = ResidualSettings(source="signals", dropout=0.0)
    train(model, source, settings, residual, BLOCK, Callbacks(logged.append, lambda step, save: None))
    assert np.isfinite(logged[-1]["loss"])


def test_too_much_poison_fails_and_says_so(tmp_path: Path, in_process: list[int]) -> None:
    made = recipe(tmp_path, signals={"max_bad_rows": 0.02})
    prepared(made, poison)
    with pytest.raises(UserError) as caught:
        precompute.run(context(made))
    message = str(caught.value)
    assert "of 120 rows cannot be used, more than signals.max_bad_rows (0.02) allows" in message
    assert signal_files.BAD_ROWS in message and "raise signals.max_bad_rows" in message
    assert "signals.max_bad_rows" not in key_material(stages_of(made)["signals"], made, {})["recipe"]
    found = len(in_process)
    summary = precompute.run(context(recipe(tmp_path, signals={"max_bad_rows": 0.2})))
    assert len(in_process) == len(summary["shards"]) > found, "what was computed is not computed again"


# -- repair


def test_repair_computes_only_damaged_shards(made: Recipe, in_process: list[int]) -> None:
    ctx = context(made)
    with pytest.raises(UserError, match="--repair: .* has no manifest"):
        precompute.repair(ctx)
    summary = precompute.run(ctx)
    whole = shards_of(ctx)
    storage.write_json(f"{ctx.directory}/manifest.json", {"summary": summary})
    assert precompute.repair(ctx) is None and "0 to compute again" in said(ctx)
    in_process.clear()
    flipped = bytearray(whole["shard-00001.parquet"])
    flipped[len(flipped) // 2] ^= 1
    Path(ctx.directory, "shard-00001.parquet").write_bytes(flipped)
    Path(ctx.directory, "shard-00003.parquet").unlink()
    with pytest.raises(UserError, match=r"shard-00001\.parquet is damaged \(its sha256"):
        list(map(SignalSource(ctx.directory, summary).row, range(120)))
    ctx = context(made)
    assert precompute.repair(ctx) == summary and shards_of(ctx) == whole and in_process == [1, 3]
    assert "shard-00001.parquet is damaged: its sha256 is" in said(ctx)
    assert "shard-00003.parquet is damaged: it is missing" in said(ctx)


@pytest.mark.faults("a corrupted shard", "signals")
def test_repair_from_the_command_line_keeps_the_key(
    ray_cluster: str,
    made: Recipe,
    in_process: list[int],
    capsys: pytest.CaptureFixture[str],
    fault_table: FaultTable,
) -> None:
    path = Path(made.storage, "recipe.yaml")
    path.write_text(dump_recipe(made))
    command = ["--recipe", str(path), "--stages", "signals"]
    assert main([*command, "--repair"]) == 2
    assert "stage signals is not done here" in capsys.readouterr().err
    assert main(["--recipe", str(path), "--stages", "prepare", "--repair"]) == 2
    assert "only signals can be repaired" in capsys.readouterr().err
    assert main(command) == 0 and in_process
    in_process.clear()
    run = RunDirectory(made.run_directory)
    before = run.manifest("signals")
    assert main([*command, "--repair"]) == 0 and not in_process
    Path(made.run_directory, "signals", "shard-00002.parquet").write_bytes(b"damaged")
    assert main(command) == 0 and not in_process, "a finished stage is not looked into unasked"
    assert main([*command, "--repair"]) == 0 and in_process == [2]
    assert run.manifest("signals") == before
    assert "1 to compute again" in capsys.readouterr().out
    fault_table.add("a training stops and names the shard; --repair computes it again", "the same manifest")


# -- the trainer


@pytest.mark.parametrize("keep_mass", [None, 0.02], ids=["fixed k", "adaptive k"])
def test_cached_signals_train_as_the_online_ones(keep_mass: float | None, tmp_path: Path) -> None:
    """Same rule, same loss, same gradients, up to the rounding of the stored log-probabilities and of other batches."""
    made = recipe(tmp_path, signals={"keep_mass": keep_mass, "alpha_temperature": 0.8, "delta_temperature": 1.1})
    prepared(made)
    ctx = context(made)
    job = make_job(ctx)
    torch.set_num_threads(1)
    actor = SignalActor(job)
    found = SignalSummary(ctx, job)
    for shard in range(job.num_shards):
        actor.compute(shard)
        assert found.add(shard)
    cached = SignalSource(ctx.directory, found.manifest())
    online = ExampleSource(job.examples, job.noise, job.chunks)
    settings = TrainSettings(steps=1, batch_size=40, learning_rate=1e-3, log_every=1, clip_norm=1e9)
    gradients, losses = [], []
    for source, kind in ((cached, "signals"), (online, "online")):
        model = load_model(made.target.start)
        logged: list[Any] = []
        seen: list[torch.Tensor] = []
        model.embedding.weight.register_hook(lambda g, seen=seen: seen.append(g.clone()))
        residual = ResidualSettings(source=kind, dropout=0.0)  # type: ignore[arg-type]
        callbacks = Callbacks(logged.append, lambda step, save: None)
        rule = made.signals.rule
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
def test_the_trainer_refuses_signals_of_another_kind(field: str, value: Any, made: Recipe) -> None:
    ctx = context(made, "target")
    job = make_job(context(made))
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


def test_the_online_path_keys_on_the_rule(tmp_path: Path) -> None:
    """top_k decides what an online target learns, so it belongs to the target's key; with a cache to the cache's."""
    online = {"source": "online", "alpha": "normalized_entropy"}
    start = str(GOLDEN / "sdar_tiny")
    target = {"start": start, "train": {"steps": 1, "batch_size": 1}, "residual": online}
    for changed, expected in (({"target": target}, True), ({}, False)):
        made = recipe(tmp_path, **changed)
        material = key_material(stages_of(made)["target"], made, {})
        assert ("signals.top_k" in material["recipe"]) is expected
    assert Chunks.from_manifest({"file": [0, 0, 1], "rows": [1, 2, 3]}).group == (0, 1, 0)
