"""The training stages on real Ray: several workers train what one does, lost ones are replaced, errors are not retried.

Models are the golden ones, of a few thousand parameters: what is tested is what stands around the loop.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ray.exceptions import RayActorError
from ray.train import Checkpoint
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

from pipelines import train as train_stage
from pipelines.recipe.load import parse_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.directory import RunDirectory, StageContext, key_material
from pipelines.run.stages import stages_of
from pipelines.training.checkpoints import finished_steps
from pipelines.training.faults import RetryLostWorkersOnly, disk_full, user_error
from pipelines.training.job import make_job
from pipelines.training.metrics import MetricsLog, read_metrics
from pipelines.training.worker import start_model, validation
from rcd_core import load_model
from rcd_core.errors import UserError
from rcd_core.training.data.batches import collate_packed
from rcd_core.training.data.examples import ExampleSource
from rcd_core.training.loop import Callbacks, train
from rcd_core.training.objective import reference_signals
from tests.fault_table import FaultTable

GOLDEN = Path(__file__).parents[1] / "golden"
BLOCK = 4
STEPS = {"steps": 24, "batch_size": 4, "learning_rate": 1e-3, "log_every": 1, "checkpoint_every": 4}


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Ray Train's controller looks at its workers more often than every two seconds."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    yield
    patch.undo()


def recipe(storage: Path, name: str, *, train: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    raw = {
        "name": name,
        "storage": str(storage),
        "block_length": BLOCK,
        "data": {"task": "sudoku", "train": "synthetic", "test": "synthetic", "num_train": 40, "num_test": 1},
        "tokenizer": {"path": str(GOLDEN / "sdar_tiny")},
        "target": {
            "start": str(GOLDEN / "sdar_tiny"),
            "train": {**STEPS, **(train or {})},
            "residual": {"source": "self"},
        },
        "evaluate": {"starts": ["zero"]},
        "deploy": {"start": "zero"},
        "resources": {"num_workers": 2, "timeout_s": 60},
    }
    for key, value in sections.items():
        raw[key] |= value  # type: ignore[operator]
    return parse_recipe(raw)


def examples(count: int, seed: int) -> pa.Table:
    generator = np.random.default_rng(seed)
    ids = [generator.integers(0, 490, BLOCK * n).tolist() for n in generator.integers(2, 5, count)]
    lists = pa.list_(pa.int32())
    return pa.table(
        {
            "example_id": [f"{seed}-{i:03d}" for i in range(count)],
            "input_ids": pa.array(ids, lists),
            "labels": pa.array([[-100] * BLOCK + row[BLOCK:] for row in ids], lists),
        }
    )


def context(made: Recipe, stage: str = "target") -> StageContext:
    """A run with 40 prepared examples and 6 held-out ones, about to train `stage`."""
    run = RunDirectory(made.run_directory)
    material = key_material(stages_of(made)["prepare"], made, {})
    run.begin("prepare", material)
    directory = Path(run.stage_directory("prepare"))
    for split, table in (("train", examples(40, 0)), ("validation", examples(6, 1))):
        (directory / split).mkdir(exist_ok=True)
        pq.write_table(table, directory / split / "part-0.parquet")
    chunks = {"file": [0], "rows": [40], "tokens": [1], "labelled": [1]}
    names = ["part-0.parquet"]
    # The golden checkpoint has no tokenizer's words; its files are enough to be copied along.
    (directory / "tokenizer").exists() or os.symlink(TOKENIZER, directory / "tokenizer")
    run.finish("prepare", material, {"train": names, "validation": names, "chunks": chunks}, datetime.now(), 0.0)
    console = Console(file=io.StringIO(), width=200)
    inputs = stages_of(made)[stage].inputs
    return StageContext(recipe=made, run=run, stage=stage, key="0123456789abcdef" * 4, inputs=inputs, console=console)


TOKENIZER = ""


@pytest.fixture(autouse=True, scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    from rcd_core.text.tokenizer import train_tokenizer

    global TOKENIZER
    TOKENIZER = str(tmp_path_factory.mktemp("tokenizer"))
    train_tokenizer(["1 2 3"], 300).save_pretrained(TOKENIZER)


def weights(ctx: StageContext) -> dict[str, torch.Tensor]:
    return load_file(Path(ctx.directory) / "model" / "model.safetensors")


def metrics(ctx: StageContext) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(ctx.directory) / "metrics.jsonl").read_text().splitlines()]


def alone(ctx: StageContext) -> dict[str, torch.Tensor]:
    """What the job comes to in one process without Ray."""
    job = make_job(ctx)
    torch.set_num_threads(1)
    model = start_model(job).requires_grad_(True)
    source = ExampleSource(job.examples, job.noise, job.chunks)
    silent = Callbacks(lambda line: None, lambda step, save: None)
    settings = replace(job.settings, strategy="ddp")
    train(model, source, settings, job.residual, job.block_length, silent, noise=job.noise)
    return model.official_files()[1]


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The difference is a thousandth of what training has changed: Adam makes much of rounding where gradients are
    next to nothing, so single numbers may differ by more."""
    start = load_file(GOLDEN / "sdar_tiny" / "model.safetensors")
    assert a.keys() == b.keys() == start.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= 1e-3 * (b[name] - start[name]).norm(), name


def training_workers() -> list[psutil.Process]:
    """Ray Train's workers below this process, which has started the cluster: nobody else's."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


class Killer:
    """SIGKILL to one training worker once `step` is logged; waits for a registered checkpoint before."""

    def __init__(self, ctx: StageContext, step: int) -> None:
        self.directory, self.step = Path(ctx.directory), step
        self.killed_at: int | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Killer:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.is_set():
            with contextlib.suppress(OSError, ValueError, IndexError):
                last = json.loads((self.directory / "metrics.jsonl").read_text().splitlines()[-1])["step"]
                registered = list(self.directory.glob("ray/*/checkpoint_manager_snapshot.json"))
                if last >= self.step and registered:
                    worker = training_workers()[-1]
                    os.kill(worker.pid, signal.SIGKILL)
                    self.killed_at = last
                    return
            time.sleep(0.01)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.drill)])
@pytest.mark.timeout(280)
def test_a_killed_worker_is_replaced_and_nothing_shows_in_the_result(
    strategy: str, ray_cluster: str, tmp_path: Path
) -> None:
    """Two workers train what one process does; one of them killed, the run ends with the same bits."""
    settings = {"strategy": strategy, "validate_every": 8, "pack_length": 24}
    quiet = context(recipe(tmp_path, "quiet", train=settings, data={"num_validation": 6}))
    summary = train_stage.run(quiet)
    close(weights(quiet), alone(quiet))
    assert [m["step"] for m in metrics(quiet) if "validation_loss" in m] == [8, 16, 24]
    assert not (Path(quiet.directory) / "restarts.jsonl").exists()

    ctx = context(recipe(tmp_path, "killed", train=settings, data={"num_validation": 6}))
    with Killer(ctx, 9) as killer:
        again = train_stage.run(ctx)
    assert killer.killed_at and killer.killed_at < 24
    restarts = (Path(ctx.directory) / "restarts.jsonl").read_text().splitlines()
    assert len(restarts) == 1
    assert again == summary
    assert all(torch.equal(a, b) for a, b in zip(weights(quiet).values(), weights(ctx).values(), strict=True))
    assert [m["step"] for m in metrics(ctx)] == list(range(1, 25)), "no step is logged twice"
    assert not (Path(ctx.directory) / "ray").exists()
    values = [[m["validation_loss"] for m in metrics(c) if "validation_loss" in m] for c in (quiet, ctx)]
    assert values[0] == values[1] and len(set(values[0])) == 3


def test_an_error_of_the_run_is_not_tried_again_and_arrives_as_one_line(ray_cluster: str, tmp_path: Path) -> None:
    ctx = context(recipe(tmp_path, "nan", train={"learning_rate": 1e30}, target={"residual": {"source": "none"}}))
    with pytest.raises(UserError, match="loss or gradient is not finite at step") as caught:
        train_stage.run(ctx)
    assert "\n" not in str(caught.value) and "last good checkpoint" in str(caught.value)
    assert not (Path(ctx.directory) / "restarts.jsonl").exists(), "resources.max_failures is 3"


@pytest.mark.parametrize("num_workers", [2, [2, 4]])
def test_workers_that_find_no_room_are_not_waited_for_for_ever(
    num_workers: int | list[int], ray_cluster: str, tmp_path: Path
) -> None:
    wanted = {"num_workers": num_workers, "cpus_per_worker": 3, "timeout_s": 2}
    ctx = context(recipe(tmp_path, "roomy", train={"batch_size": 12}, resources=wanted))
    with pytest.raises(UserError, match=r"no room .* within 2 s .* need 2 x \(CPU 3\)"):
        train_stage.run(ctx)


# -- what is tried again ----------------------------------------------------------------------------------------------


def full_disk() -> OSError:
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"0")
    return caught.value


def test_only_lost_workers_are_tried_again(tmp_path: Path) -> None:
    policy = RetryLostWorkersOnly("target", str(tmp_path))
    restarts = tmp_path / "restarts.jsonl"
    for errors, kind in (
        ({0: UserError("a row is bad"), 1: RayActorError()}, UserError),
        ({1: TypeError("a bug")}, TypeError),
        ({0: full_disk()}, UserError),
        ({0: CheckpointException("ranks", {0: (ValueError("odd"), None)})}, RuntimeError),  # type: ignore[dict-item]
    ):
        with pytest.raises(kind):
            policy.after_exception(None, errors)
        assert not restarts.exists()
    peer = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:31416")
    policy.after_exception(None, {0: RayActorError(), 1: TypeError("half a message")})
    policy.after_exception(None, {1: peer})
    assert [list(json.loads(line)["workers"]) for line in restarts.read_text().splitlines()] == [["0", "1"], ["1"]]


def test_what_the_user_reads_of_a_failure() -> None:
    from ray.train import ControllerError, WorkerGroupError

    bug = TypeError("a bug")
    assert user_error(ControllerError(bug), "target", 3) is bug
    assert str(user_error(ControllerError(UserError("mend it")), "target", 3)) == "mend it"
    lost = user_error(WorkerGroupError("long\ntext", {1: RayActorError(error_msg="it died")}), "target", 3)
    assert isinstance(lost, UserError) and "resources.max_failures 3" in str(lost) and "it died" in str(lost)


def test_a_full_disk_is_known_behind_what_torch_makes_of_it(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").symlink_to("/dev/full")
    with pytest.raises(CheckpointException) as caught:
        dcp.save({"w": torch.zeros(1 << 20)}, checkpoint_id=tmp_path, no_dist=True)
    assert disk_full(caught.value)
    assert disk_full(full_disk()) and not disk_full(OSError("something else"))


def test_a_checkpoint_that_lacks_a_file_is_not_whole(tmp_path: Path) -> None:
    for name in ("progress.json", ".metadata", "state"):
        (tmp_path / name).write_text('{"step": 7, "strategy": "fsdp2"}')
    checkpoint = Checkpoint.from_directory(str(tmp_path))
    assert finished_steps(checkpoint) == 7
    (tmp_path / ".metadata").unlink()
    assert finished_steps(checkpoint) is None
    (tmp_path / "progress.json").write_text('{"step": 7, "strategy": "deepspeed"}')
    assert finished_steps(checkpoint) == 7
    (tmp_path / "progress.json").write_text('{"step": 7, "str')
    assert finished_steps(checkpoint) is None


# -- parts that need no cluster ---------------------------------------------------------------------------------------


def test_held_out_rows_get_the_signals_that_training_has(tmp_path: Path) -> None:
    """Each rank its own rows, alone or beside others the same signals."""
    ctx = context(recipe(tmp_path, "held", train={"validate_every": 8}, data={"num_validation": 6}))
    reference = str(GOLDEN / "rcd" / "sdar_ref_tiny")
    job = replace(make_job(ctx), signals={"reference_checkpoint": reference})
    model = start_model(job)
    found = validation(job, model, rank=1, world_size=2, dtype=None, device=model.device)
    assert found.num_rows == 6 and sorted(found.source.rows) == [1, 3, 5]
    rows = [found.source.row(g) for g in (1, 3, 5)]
    batch, mine = collate_packed([[row] for row in rows], mask_token_id=511, pad_token_id=0, block_length=BLOCK)
    together = reference_signals(load_model(reference), batch, job.signal_rule)
    assert mine is not None and len(mine.entropy) == sum(int(row.masked.sum()) for row in rows)
    torch.testing.assert_close(mine.entropy, together.entropy, atol=1e-5, rtol=1e-5)


def test_metrics_go_to_the_file_and_to_gauges_and_a_resumed_run_drops_what_it_makes_again(tmp_path: Path) -> None:
    first = MetricsLog("demo", "target", str(tmp_path), 0, 0)
    for step in (1, 2, 3):
        first.log({"step": step, "loss": 0.5 * step, "loss_p0.25": 1.0})
    assert first.gauges["loss_p0.25"].info["name"] == "rcd_train_loss_p0_25"
    assert first.gauges["loss"].info["default_tags"] == {"run": "demo", "stage": "target"}
    MetricsLog("demo", "target", str(tmp_path), 1, 2).log({"step": 9})
    second = MetricsLog("demo", "target", str(tmp_path), 0, 2)
    second.log({"step": 3, "loss": 7.0})
    assert [(m["step"], m["loss"]) for m in read_metrics(str(tmp_path))] == [(1, 0.5), (2, 1.0), (3, 7.0)]


# -- minutes, run by `make drill` -------------------------------------------------------------------------------------


@pytest.mark.drill
@pytest.mark.faults("a worker lost for good, its last checkpoint damaged", "target")
@pytest.mark.timeout(600)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    ray_cluster: str, tmp_path: Path, fault_table: FaultTable
) -> None:
    """A worker lost without a retry left; the last checkpoint then lacks a file; the run ends with the same bits."""
    quiet = context(recipe(tmp_path, "quiet"))
    train_stage.run(quiet)
    ctx = context(recipe(tmp_path, "damaged", resources={"max_failures": 0}))
    lost = pytest.raises(UserError, match="lost more often than resources.max_failures 0")
    with Killer(ctx, 14), lost:
        train_stage.run(ctx)
    found = sorted(Path(ctx.directory).glob("ray/*/step-*/progress.json"))
    assert len(found) >= 2
    found[-1].unlink()
    train_stage.run(ctx)
    assert all(torch.equal(a, b) for a, b in zip(weights(quiet).values(), weights(ctx).values(), strict=True))
    fault_table.add("ended with one message; the same command resumed from the checkpoint before", "the same bits")


@pytest.mark.drill
@pytest.mark.faults("a full disk", "target")
@pytest.mark.timeout(600)
def test_a_full_disk_ends_the_run_and_it_goes_on_when_there_is_room(
    ray_cluster: str, tmp_path: Path, fault_table: FaultTable
) -> None:
    ctx = context(recipe(tmp_path, "full", resources={"num_workers": 1}))
    second = Path(ctx.directory) / "ray" / ctx.key[:16] / "step-00000008"
    second.mkdir(parents=True)
    (second / "__0_0.distcp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="no space left while a checkpoint was written"):
        train_stage.run(ctx)
    (second / "__0_0.distcp").unlink()
    train_stage.run(ctx)
    close(weights(ctx), alone(ctx))
    fault_table.add(
        "ended with one message; the same command resumed from the last complete checkpoint", "the same model"
    )


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_an_elastic_run_takes_the_workers_there_is_room_for(ray_cluster: str, tmp_path: Path) -> None:
    """The cluster has room for one of two workers; then for both, one of which is lost. It is the same model."""
    one = context(recipe(tmp_path, "one", resources={"num_workers": [1, 2], "cpus_per_worker": 3}))
    train_stage.run(one)
    two = context(recipe(tmp_path, "two", resources={"num_workers": [1, 2]}))
    with Killer(two, 9) as killer:
        train_stage.run(two)
    assert killer.killed_at
    close(weights(one), alone(one))
    close(weights(two), weights(one))


@pytest.mark.drill  # needs the extra `deepspeed`, and builds C++ code the first time
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_goes_on_after_a_killed_worker(stage: int, ray_cluster: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    settings = {"strategy": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}}
    quiet, killed = (context(recipe(tmp_path, name, train=settings)) for name in ("quiet", "killed"))
    train_stage.run(quiet)
    close(weights(quiet), alone(quiet))
    with Killer(killed, 9) as killer:
        train_stage.run(killed)
    assert killer.killed_at
    assert all(torch.equal(a, b) for a, b in zip(weights(quiet).values(), weights(killed).values(), strict=True))
