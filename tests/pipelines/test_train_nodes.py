"""A training that loses a whole node, or whose driver is told to stop: it goes on and ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.training.metrics import read_metrics
from tests.fault_table import FaultTable
from tests.pipelines.test_job import FEW, ROOT
from tests.pipelines.test_train import training_workers

DRIVER = """
import json, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
import tests.pipelines.test_train as t
from pipelines import train as train_stage
from pipelines.training.metrics import read_metrics
from rcd_core.text.tokenizer import train_tokenizer
storage, temp_dir = Path(sys.argv[1]), sys.argv[2]
t.TOKENIZER = str(storage / "tokenizer")
train_tokenizer(["1 2 3"], 300).save_pretrained(t.TOKENIZER)
# Exit hooks need the main thread, where a replacement is not started; the nodes end below.
head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": temp_dir}
cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
def context(name):
    resources = {"cpus_per_worker": 2}
    return t.context(t.recipe(storage, name, train={"strategy": "fsdp2", "steps": 40}, resources=resources))
try:
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    train_stage.run(context("quiet"))
    ctx = context("lost")
    directory = Path(ctx.directory)
    def replace_one():
        while not list(directory.glob("ray/*/checkpoint_manager_snapshot.json")):
            time.sleep(0.01)
        lost = time.monotonic()
        cluster.remove_node(nodes[0], allow_graceful=False)
        before = read_metrics(ctx.directory)
        (directory / "before.json").write_text(json.dumps(before))
        cluster.add_node(num_cpus=2)
        while read_metrics(ctx.directory)[-1]["step"] <= before[-1]["step"]:
            time.sleep(0.05)
        (directory / "seconds.json").write_text(json.dumps(time.monotonic() - lost))
    replacing = threading.Thread(target=replace_one, daemon=True)
    replacing.start()
    train_stage.run(ctx)
    replacing.join(10)
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.drill
@pytest.mark.faults("a worker node removed", "target")
@pytest.mark.timeout(600)
def test_a_lost_node_is_replaced_and_nothing_shows_in_the_result(tmp_path: Path, fault_table: FaultTable) -> None:
    """Two nodes with one worker each, in a cluster of its own; one is killed after a checkpoint, and a third comes."""
    with tempfile.TemporaryDirectory(prefix="rcd-test-", dir="/tmp", ignore_cleanup_errors=True) as temp_dir:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-c", DRIVER, str(tmp_path), temp_dir]
        process = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert process.returncode == 0, process.stderr
    quiet, lost = (tmp_path / name / "target" for name in ("quiet", "lost"))
    before, after = json.loads((lost / "before.json").read_text()), read_metrics(str(lost))
    assert 4 <= len(before) < 40
    assert after[:4] == before[:4], "with the speeds measured then: the first checkpoint's steps were not made again"
    assert len((lost / "restarts.jsonl").read_text().splitlines()) == 1 and not (quiet / "restarts.jsonl").exists()
    assert (lost / "model/model.safetensors").read_bytes() == (quiet / "model/model.safetensors").read_bytes()
    assert curve(lost) == curve(quiet)
    assert not (lost / "ray").exists()
    happened = "the workers restarted from the last checkpoint, one on a new node"
    fault_table.add(happened, "the same bytes", json.loads((lost / "seconds.json").read_text()))


def curve(stage: Path) -> list[tuple[float, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(str(stage))]


# -- the driver is told to stop ---------------------------------------------------------------------------------------

SETTINGS = [*FEW, "data.num_train=256", "data.num_test=6", "variants={}", "resources.num_workers=2"]
SETTINGS += ["base.train.log_every=1", "base.train.checkpoint_every=10"]


def start(program: str, stages: str, storage: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "pipelines" / program), "--recipe", "demo", "--storage", str(storage)]
    command += ["--stages", stages, *(word for s in SETTINGS for word in ("--set", s))]
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **streams)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        out = process.communicate(timeout=200)[0]
    finally:
        process.kill()  # changes nothing when it has ended
    assert process.returncode == code, out
    return out


def checkpoints(stage: Path) -> list[int]:
    """Steps of those that Ray has registered."""
    for path in stage.glob("ray/*/checkpoint_manager_snapshot.json"):
        found = json.loads(path.read_text())["checkpoint_results"]
        return sorted(int(result["checkpoint_dir_name"].split("-")[1]) for result in found)
    return []


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.drill
@pytest.mark.faults("SIGTERM, then Ctrl-C, to the driver", "base")
@pytest.mark.timeout(600)
def test_a_stopped_training_leaves_no_worker_and_goes_on_from_its_last_checkpoint(
    ray_cluster: str, tmp_path: Path, fault_table: FaultTable
) -> None:
    """train.py gets SIGTERM in the middle of a training, the next one Ctrl-C further on; the third ends with the bits
    of an undisturbed run."""
    finish(start("full.py", "prepare,base", tmp_path / "quiet"))
    finish(start("prepare.py", "prepare", tmp_path))
    stage = tmp_path / "demo" / "base"
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        before = checkpoints(stage)[-1:]
        process = start("train.py", "base", tmp_path)
        wait_until(lambda: checkpoints(stage)[-1:] > before, process)  # noqa: B023
        assert training_workers()
        process.send_signal(number)
        out = finish(process, code)
        assert out.count(f"stopped by {number.name}; run the same command again to resume") == 1, out
        assert "Traceback" not in out and "error" not in out.lower(), out
        wait_until(lambda: not training_workers())
        assert not (stage / "manifest.json").exists()
    assert 10 < checkpoints(stage)[-1] < 60
    kept = read_metrics(str(stage))[: checkpoints(stage)[-1]]
    out = finish(start("train.py", "base", tmp_path))
    assert "base: starts, was interrupted, resumes" in out

    lines = read_metrics(str(stage))
    assert lines[: len(kept)] == kept, "with the speeds measured then: these steps were not made again"
    quiet = tmp_path / "quiet" / "demo" / "base"
    assert curve(stage) == curve(quiet) and len(lines) == 60
    assert (stage / "model/model.safetensors").read_bytes() == (quiet / "model/model.safetensors").read_bytes()
    assert not (stage / "restarts.jsonl").exists(), "nothing was lost"
    fault_table.add("no worker was left; the same command resumed from the last checkpoint", "the same bytes")
