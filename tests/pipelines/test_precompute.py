"""The stage `signals` on real Ray: planned before it is computed, killed anywhere it ends with the same bytes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from pipelines import precompute, signal_files, waiting
from pipelines import train as train_stage
from pipelines.config import Recipe, dump_recipe, load_recipe, parse_recipe
from pipelines.driver import main
from pipelines.run import RunDirectory, StageContext, material_of
from pipelines.signal_actor import SignalActor, SignalJob
from pipelines.signal_plan import GROUP_BATCHES, groups, plan_batches, plan_shards, predicted_bytes, wanted_rows
from pipelines.stages import stages_of
from rcd_core import storage
from rcd_core.errors import UserError
from rcd_core.families.loading import load_model
from rcd_core.residual import ResidualSettings
from rcd_core.training.examples import Chunks
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.row_order import RowOrder
from rcd_core.training.rows import ExampleSource, Row
from rcd_core.training.settings import TrainSettings
from rcd_core.training.signal_rows import SignalSource

GOLDEN = Path(__file__).parents[1] / "golden"
BLOCK = 4


def recipe(tmp_path: Path, **changes: Any) -> Recipe:
    train = {"steps": 30, "batch_size": 4, "learning_rate": 1e-3, **changes.pop("train", {})}
    raw = {
        "name": changes.pop("name", "run"),
        "storage": str(tmp_path),
        "block_length": BLOCK,
        "data": {"task": "sudoku", "train": "synthetic", "test": "synthetic", "num_train": 60, "num_test": 1},
        "noise": {"draws": 3},
        "tokenizer": {"path": str(GOLDEN / "sdar_tiny")},
        "reference": {"start": str(GOLDEN / "rcd" / "sdar_ref_tiny"), "train": None},
        "target": {"start": str(GOLDEN / "sdar_tiny"), "train": train},
        "signals": {"top_k": 8, "shard_mb": 0.003, "batch_tokens": 64, **changes.pop("signals", {})},
        "resources": {"signal_actors": 2, **changes.pop("resources", {})},
        **changes,
    }
    return parse_recipe(raw)


def prepared(made: Recipe, poison: Callable[[int, dict[str, Any]], dict[str, Any]] = lambda i, e: e) -> None:
    """A run with 60 examples in two files, chunks of 16, and the checkpoint that stands for the reference."""
    run = RunDirectory(made.run_directory)
    stages = {name: material_of(stages_of(made)[name], made, {}) for name in ("prepare", "reference")}
    for name, material in stages.items():
        run.begin(name, material)
    directory = Path(run.stage_directory("prepare")) / "train"
    directory.mkdir()
    examples = []
    for i in range(60):
        ids = np.random.default_rng(i).integers(0, 500, BLOCK * (2 + i % 5)).tolist()
        examples.append(poison(i, {"example_id": f"{i:04d}", "input_ids": ids, "labels": [-100] * BLOCK + ids[BLOCK:]}))
    chunks: dict[str, list[int]] = {name: [] for name in ("file", "rows", "tokens", "labelled")}
    fields = pa.schema({"example_id": pa.string(), "input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())})
    for number, part in enumerate((examples[:40], examples[40:])):
        pq.write_table(pa.Table.from_pylist(part, fields), directory / f"part-{number}.parquet", row_group_size=16)
        for held in (part[i : i + 16] for i in range(0, len(part), 16)):
            tokens = sum(len(e["input_ids"] or ()) for e in held)
            for name, value in (("file", number), ("rows", len(held)), ("tokens", tokens), ("labelled", tokens // 2)):
                chunks[name].append(value)
    summary = {
        "train": ["part-0.parquet", "part-1.parquet"],
        "chunks": chunks,
        "vocab_size": 512,
        "mask_token_id": 511,
        "tokenizer_sha256": "0" * 64,
    }
    contents = {"prepare": summary, "reference": {"checkpoint": made.reference.start}}
    for name, material in stages.items():
        run.finish(name, material, contents[name], datetime.now(), 0.0)


def context(made: Recipe, stage: str = "signals") -> StageContext:
    return StageContext(
        recipe=made,
        run=RunDirectory(made.run_directory),
        stage=stage,
        key="k",
        inputs=stages_of(made)[stage].inputs,
        console=Console(file=io.StringIO(), width=200),
    )


def said(ctx: StageContext) -> str:
    text: str = ctx.console.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.fixture
def made(tmp_path: Path) -> Recipe:
    made = recipe(tmp_path)
    prepared(made)
    return made


@dataclass
class Result:
    ctx: StageContext
    summary: dict[str, Any]
    shards: dict[str, bytes]


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What two actors make when nothing goes wrong."""
    made = recipe(tmp_path_factory.mktemp("undisturbed"))
    prepared(made)
    ctx = context(made)
    summary = precompute.run(ctx)
    return Result(ctx, summary, shards_of(ctx))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An actor in this process instead of Ray, where the test is about files; the shards it was asked for."""
    asked: list[int] = []

    def compute(ctx: StageContext, job: SignalJob, shards: list[int]) -> Iterator[int]:
        actor = SignalActor(job) if shards else None
        for shard in shards:
            assert actor is not None
            actor.compute(shard)
            asked.append(shard)
            yield shard

    monkeypatch.setattr(precompute, "_compute", compute)
    return asked


def shards_of(ctx: StageContext) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(ctx.directory).glob("shard-*.parquet"))}


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
        assert offsets[0] == 0 and offsets[-1] == 4000 == wanted_rows(made, sum(rows))
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
    assert wanted_rows(recipe(tmp_path, train={"steps": 1000}), 60) == 3 * 60
    assert wanted_rows(recipe(tmp_path, train={"steps": 10}, variants={"other": {}}), 60) == 40


def test_batches_keep_to_their_budget_and_sort_by_length() -> None:
    lengths = [40, 8, 16, 40, 8, 100, 12]
    batches = plan_batches(lengths, 48)
    assert sorted(i for b in batches for i in b) == list(range(7))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 48 for b in batches)
    assert batches[0] == [1, 4, 6] and batches[-1] == [5], "what is above the budget goes alone"
    none = np.zeros(0)
    rows = [Row(i, "", 0, np.zeros(n), none, none, 1.0) for i, n in enumerate([30] * 40)]
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


def check_rows(ctx: StageContext, summary: dict[str, Any]) -> None:
    """Each planned row once, with the example, the noise and the signals that belong to it."""
    directory = Path(ctx.directory)
    tables = [pq.read_table(directory / name) for name in summary["shards"]]
    assert [len(t) for t in tables] == np.diff(summary["row_offsets"]).tolist()
    rows = [row for table in tables for row in table.to_pylist()]
    prepare = Path(ctx.run.stage_directory("prepare")) / "train"
    source = ExampleSource([str(prepare / f"part-{i}.parquet") for i in (0, 1)], ctx.recipe.noise)
    for g, row in enumerate(rows):
        expected = source.row(g)
        assert (row["example_id"], row["draw"]) == (expected.example_id, expected.draw)
        assert row["input_ids"] == expected.input_ids.tolist() and row["labels"] == expected.labels.tolist()
        assert row["masked_positions"] == np.flatnonzero(expected.masked).tolist()
        assert len(row["entropy"]) == len(row["tail_mass"]) == len(row["masked_positions"])
        assert len(row["topk_ids"]) == len(row["topk_logprobs"]) == 8 * len(row["masked_positions"])
    assert len({(r["example_id"], r["draw"]) for r in rows}) == len(rows) == summary["rows"] == 120


def test_rows_and_manifest(undisturbed: Result) -> None:
    ctx, summary, made = undisturbed.ctx, undisturbed.summary, undisturbed.ctx.recipe
    check_rows(ctx, summary)
    assert len(undisturbed.shards) > len(MOMENTS)
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
    assert f"{len(undisturbed.shards) - 3} of {len(undisturbed.shards)} shards are already there" in said(ctx)
    assert shards_of(ctx) == undisturbed.shards and not list(directory.glob(".*"))


def test_a_row_does_not_depend_on_its_neighbours(made: Recipe, tmp_path: Path) -> None:
    """Alone in its batch or among longer ones: the same numbers up to rounding."""
    job = precompute.make_job(context(made))
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
    actor = SignalActor(precompute.make_job(context(made)))
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
    assert "signals.max_bad_rows" not in material_of(stages_of(made)["signals"], made, {})["recipe"]
    found = len(in_process)
    summary = precompute.run(context(recipe(tmp_path, signals={"max_bad_rows": 0.2})))
    assert len(in_process) == len(summary["shards"]) > found, "what was computed is not computed again"


# -- repair


def test_repair_computes_only_damaged_shards(made: Recipe, in_process: list[int]) -> None:
    ctx = context(made)
    with pytest.raises(UserError, match="--repair mends finished signals"):
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
    assert "shard-00003.parquet is damaged: it is not there" in said(ctx)


def test_repair_from_the_command_line_keeps_the_key(
    ray_cluster: str, made: Recipe, in_process: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(made.storage, "recipe.yaml")
    path.write_text(dump_recipe(made))
    command = ["--recipe", str(path), "--stages", "signals"]
    assert main([*command, "--repair"]) == 2
    assert "stage signals is not done here" in capsys.readouterr().err
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


# -- what stops it


def test_an_error_in_the_code_fails_at_once(ray_cluster: str, made: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompute, "SignalActor", BrokenActor)
    with pytest.raises(Exception, match="a mistake in the code"):
        precompute.run(context(made))
    assert Path(made.storage, "calls").read_text().count("x") <= 4, "not tried again"


def test_waiting_is_announced_and_ends_when_the_recipe_says(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompute, "SignalActor", SleepingActor)
    monkeypatch.setattr(waiting, "EVERY_S", 0.5)
    made = recipe(tmp_path, resources={"no_progress_timeout_s": 3.0})
    prepared(made)
    ctx = context(made)
    with pytest.raises(UserError, match=r"no shard was finished for 3 s, resources\.no_progress_timeout_s"):
        precompute.run(ctx)
    assert "signals: waiting for a shard, of up to 2 x (CPU 1), since" in said(ctx) and "(0 of" in said(ctx)


# -- kills


class BrokenActor(SignalActor):
    def compute(self, shard: int) -> None:
        with (Path(self.job.directory).parents[1] / "calls").open("a") as calls:
            calls.write("x")
        raise ZeroDivisionError("a mistake in the code")


class SleepingActor(SignalActor):
    def compute(self, shard: int) -> None:
        time.sleep(600)


class KillingActor(SignalActor):
    """Sends SIGKILL once between two writes of each of the shards that <storage>/kills.json assigns a moment to: to
    itself, or to the process that it names as victim."""

    def compute(self, shard: int) -> None:
        here = Path(self.job.directory).parents[1]
        kills = json.loads((here / "kills.json").read_text())
        moment, marker = kills["moments"].get(str(shard)), here / f"killed-{shard}"

        def reached(here: str) -> None:
            if here == moment and not marker.exists():
                marker.touch()
                os.kill(kills["victim"] or os.getpid(), signal.SIGKILL)
                time.sleep(1.0)  # the victim is gone; the actor is ended after it, in the middle of what it does

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "_sync", lambda path: reached(f"before the rename of the {_kind(path)}"))
            patch.setattr(signal_files.ShardWriter, "write", _then(signal_files.ShardWriter.write, reached, "during"))
            real = signal_files.write_sidecar
            patch.setattr(signal_files, "write_sidecar", lambda *a: (reached("before the sidecar"), real(*a)))
            super().compute(shard)
        reached("after the sidecar")


def _kind(temporary: str) -> str:
    return "sidecar" if ".json." in temporary else "shard"


def _then(function: Any, reached: Callable[[str], None], moment: str) -> Any:
    def wrapped(*arguments: Any) -> Any:
        found = function(*arguments)
        reached(moment)
        return found

    return wrapped


MOMENTS = (
    "during",
    "before the rename of the shard",
    "before the sidecar",
    "before the rename of the sidecar",
    "after the sidecar",
)


def kills(made: Recipe, moments: dict[int, str], victim: int | None = None) -> None:
    storage.write_json(f"{made.storage}/kills.json", {"moments": moments, "victim": victim})


def test_actors_killed_between_any_two_writes(
    undisturbed: Result, made: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kill per shard, at five different moments: Ray starts the actor again, which computes the shard again."""
    monkeypatch.setattr(precompute, "SignalActor", KillingActor)
    kills(made, dict(enumerate(MOMENTS)))
    ctx = context(made)
    assert precompute.run(ctx) == undisturbed.summary
    assert len(list(Path(made.storage).glob("killed-*"))) == len(MOMENTS) and shards_of(ctx) == undisturbed.shards
    assert not list(Path(ctx.directory).glob(".*"))


DRIVER = """
import os, sys
from pathlib import Path
import tests.pipelines.test_precompute as t
from pipelines import precompute
from pipelines.cluster import connect
made = t.recipe(Path(sys.argv[1]))
t.kills(made, {int(sys.argv[2]): sys.argv[3]}, os.getpid())
connect()
precompute.SignalActor = t.KillingActor
precompute.run(t.context(made))
"""


def kill_the_driver(made: Recipe, shard: int, moment: str) -> None:
    """SIGKILL to a driver in a process of its own, at the moment at which an actor stands between two writes."""
    command = [sys.executable, "-c", DRIVER, made.storage, str(shard), moment]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr


def check_after_kills(made: Recipe, undisturbed: Result) -> None:
    ctx = context(made)
    summary = precompute.run(ctx)
    assert summary == undisturbed.summary and shards_of(ctx) == undisturbed.shards
    check_rows(ctx, summary)
    assert not list(Path(ctx.directory).glob(".*"))


def test_the_driver_killed_before_a_sidecar(undisturbed: Result, made: Recipe) -> None:
    kill_the_driver(made, 2, "before the sidecar")
    assert len(shards_of(context(made))) < len(undisturbed.shards)
    check_after_kills(made, undisturbed)


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_the_driver_killed_between_any_two_writes(undisturbed: Result, made: Recipe) -> None:
    """Killed five times in a row, each time a shard further on."""
    for shard, moment in enumerate(MOMENTS):
        kill_the_driver(made, shard, moment)
    check_after_kills(made, undisturbed)


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_a_node_killed_in_the_middle(undisturbed: Result, made: Recipe) -> None:
    """Two nodes of one actor each, in a cluster of its own; one goes away for good when it has begun."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER.replace("KillingActor", "SlowActor"), made.storage, "0", "never"],
            env={**os.environ, "RAY_ADDRESS": cluster.address},
            stderr=subprocess.PIPE,
            text=True,
        )
        directory = Path(made.run_directory, "signals")
        deadline = time.monotonic() + 200
        while len(list(directory.glob("begun-*"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.1)
        cluster.remove_node(nodes[0], allow_graceful=False)
        assert process.wait(timeout=200) == 0, process.communicate()[1]
    finally:
        cluster.shutdown()
    begun = [path.name.split("-")[1] for path in directory.glob("begun-*")]
    assert len(begun) > len(set(begun)), "what the lost node had begun was computed again"
    assert shards_of(context(made)) == undisturbed.shards


class SlowActor(SignalActor):
    """Leaves a mark when it begins a shard, and takes its time."""

    def compute(self, shard: int) -> None:
        Path(self.job.directory).mkdir(exist_ok=True)
        Path(self.job.directory, f"begun-{shard}-{os.getpid()}").touch()
        time.sleep(2)
        super().compute(shard)


# -- the trainer


@pytest.mark.parametrize("keep_mass", [None, 0.02], ids=["fixed k", "adaptive k"])
def test_cached_signals_train_as_the_online_ones(keep_mass: float | None, tmp_path: Path) -> None:
    """Same rule, same loss, same gradients, up to the rounding of the stored log-probabilities and of other batches."""
    made = recipe(tmp_path, signals={"keep_mass": keep_mass, "alpha_temperature": 0.8, "delta_temperature": 1.1})
    prepared(made)
    ctx = context(made)
    job = precompute.make_job(ctx)
    torch.set_num_threads(1)
    actor = SignalActor(job)
    found = precompute.Found(ctx, job)
    for shard in range(job.num_shards):
        actor.compute(shard)
        assert found.add(shard)
    cached = SignalSource(ctx.directory, found.summary())
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
    job = precompute.make_job(context(made))
    summary = {
        "schema_version": precompute.SCHEMA_VERSION,
        "block_length": BLOCK,
        "pad_multiple": BLOCK,
        "mask_token_id": 511,
        "tokenizer_sha256": "0" * 64,
        "noise": precompute.noise_record(job.noise),
    }
    train_stage._check_signals(ctx, summary)
    with pytest.raises(UserError) as caught:
        train_stage._check_signals(ctx, {**summary, field: value})
    assert f"the signals' {field} is {value!r} but" in str(caught.value) and "--redo signals" in str(caught.value)


def test_the_online_path_keys_on_the_rule(tmp_path: Path) -> None:
    """top_k decides what an online target learns, so it belongs to the target's key; with a cache to the cache's."""
    online = {"source": "online", "alpha": "normalized_entropy"}
    start = str(GOLDEN / "sdar_tiny")
    target = {"start": start, "train": {"steps": 1, "batch_size": 1}, "residual": online}
    for changed, expected in (({"target": target}, True), ({}, False)):
        made = recipe(tmp_path, **changed)
        material = material_of(stages_of(made)["target"], made, {})
        assert ("signals.top_k" in material["recipe"]) is expected
    assert Chunks.from_manifest({"file": [0, 0, 1], "rows": [1, 2, 3]}).group == (0, 1, 0)
