"""Drills of trainings that lose their driver, meet errors, or have no room for metrics."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import train as train_stage
from pipelines.run.directory import StageContext, run_stage
from pipelines.run.stages import stages_of
from pipelines.training import worker
from pipelines.training.metrics import MetricsLog, read_metrics
from tests.fault_table import FaultTable
from tests.pipelines.test_precompute_faults import Disk
from tests.pipelines.test_precompute_faults import disk as disk  # a fixture
from tests.pipelines.training_run import context, make_recipe, weights

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]
ONE = {"num_workers": 1}


@pytest.fixture(scope="module")
def quiet(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    """A training without any fault."""
    ctx = context(make_recipe(tmp_path_factory.mktemp("quiet"), "quiet", resources=ONE))
    train_stage.run(ctx)
    return ctx


def same_bits(a: StageContext, b: StageContext) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


DRIVER = """
import os, signal, sys
from pathlib import Path
from pipelines.ray_cluster.connection import connect
from pipelines.run.directory import RunDirectory, run_stage
from pipelines.run.stages import stages_of
from tests.pipelines.training_run import context, make_recipe
connect()
recipe = make_recipe(Path(sys.argv[1]), "killed", resources={"num_workers": 1})
ctx = context(recipe)
RunDirectory.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
run_stage(stages_of(recipe)["target"], ctx, {})
"""


@pytest.mark.faults("the driver killed between export and manifest", "target")
def test_a_driver_killed_before_the_manifest_does_not_train_again(
    quiet: StageContext, tmp_path: Path, fault_table: FaultTable
) -> None:
    process = subprocess.run([sys.executable, "-c", DRIVER, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert process.returncode == -signal.SIGKILL, process.stderr
    ctx = context(make_recipe(tmp_path, "killed", resources=ONE))
    stage, directory = stages_of(ctx.recipe)["target"], Path(ctx.directory)
    assert not (directory / "manifest.json").exists() and list(directory.glob("ray/*/step-*"))
    kept = [(path, path.stat().st_mtime_ns) for path in (directory / "metrics.jsonl", *(directory / "model").iterdir())]
    started = time.monotonic()
    run_stage(stage, ctx, {})
    seconds = time.monotonic() - started
    assert [(path, path.stat().st_mtime_ns) for path, _ in kept] == kept, "nothing was trained or written again"
    assert same_bits(ctx, quiet) and not (directory / "ray").exists()
    fault_table.add("the next job wrote the manifest without training again", "the same bits", seconds)


def failing_worker(config: dict[str, Any]) -> None:
    """Fails at step 10 as often as <stage>/failures says."""
    failures, log = Path(config["job"].directory) / "failures", MetricsLog.log

    def failing(self: MetricsLog, metrics: dict[str, float]) -> None:
        log(self, metrics)
        left = int(failures.read_text())
        if metrics["step"] == 10 and left:
            failures.write_text(str(left - 1))
            raise OSError("AWS Error SLOW_DOWN during UploadPart operation")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "log", failing)
        worker.train_worker(config)


@pytest.mark.faults("an error that passes, and one that comes again", "target")
def test_an_error_is_retried_unless_it_comes_again(
    quiet: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault_table: FaultTable
) -> None:
    monkeypatch.setattr(train_stage, "train_worker", failing_worker)
    for name, failures in (("passes", 1), ("stays", 9)):
        ctx = context(make_recipe(tmp_path, name, resources=ONE))
        Path(ctx.directory).mkdir(parents=True)
        (Path(ctx.directory) / "failures").write_text(str(failures))
        if name == "passes":
            train_stage.run(ctx)
            assert same_bits(ctx, quiet)
            assert [line["step"] for line in read_metrics(ctx.directory)] == list(range(1, 25))
        else:
            with pytest.raises(OSError, match="SLOW_DOWN"):
                train_stage.run(ctx)
            assert (Path(ctx.directory) / "failures").read_text() == "7", "twice, though resources.max_failures is 3"
        assert len((Path(ctx.directory) / "restarts.jsonl").read_text().splitlines()) == 1
    fault_table.add("resumed from the last checkpoint; at the same step again, ended with the error", "the same bits")


@pytest.mark.faults("a full disk for metrics", "target")
def test_a_training_goes_on_without_room_for_metrics(
    quiet: StageContext,
    disk: Disk,  # noqa: F811
    tmp_path: Path,
    fault_table: FaultTable,
) -> None:
    ctx = context(make_recipe(tmp_path, "full", resources=ONE))
    directory = Path(ctx.directory)
    directory.mkdir(parents=True)
    for name in ("metrics.jsonl", "tensorboard"):
        (directory / name).symlink_to(disk.path / name)
    disk.free(4)  # kB; the lines of all steps take more
    summary = train_stage.run(ctx)
    assert same_bits(ctx, quiet)
    lines = read_metrics(quiet.directory)
    assert 0 < len(read_metrics(ctx.directory)) < len(lines) and summary["loss"] == round(lines[-1]["loss"], 6)
    printed = ctx.console.file.getvalue()  # type: ignore[attr-defined]
    assert printed.count("is incomplete (") == 1 and "No space left" in printed, printed
    fault_table.add("the training went on, with one warning", "the same bits")
