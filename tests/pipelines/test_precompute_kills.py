"""The stage `signals` on real Ray when something goes wrong: killed anywhere, it ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import precompute
from pipelines.ray_cluster import waiting
from pipelines.recipe.model import Recipe
from pipelines.signals import files as signal_files
from pipelines.signals.actor import SignalActor
from rcd_core.errors import UserError
from rcd_core.io import storage
from tests.fault_table import FaultTable
from tests.pipelines.signal_run import Result, check_rows, context, prepared, recipe, said, shards_of

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
import tests.pipelines.test_precompute_kills as t
from pipelines import precompute
from pipelines.signals import files as signal_files
from pipelines.ray_cluster.connection import connect
made, shard = t.recipe(Path(sys.argv[1])), int(sys.argv[2])
t.kills(made, {shard: sys.argv[3]}, os.getpid())
connect()
signal_files.remove_shard(made.run_directory + "/signals", shard)  # an actor of a killed driver may finish it
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
@pytest.mark.faults("the driver killed between any two writes", "signals")
@pytest.mark.timeout(600)
def test_the_driver_killed_between_any_two_writes(undisturbed: Result, made: Recipe, fault_table: FaultTable) -> None:
    """Killed five times in a row, each time a shard further on."""
    for shard, moment in enumerate(MOMENTS):
        kill_the_driver(made, shard, moment)
    check_after_kills(made, undisturbed)
    fault_table.add("the next job kept the complete shards and computed the rest", "the same bytes")


NODES = """
import sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
import tests.pipelines.test_precompute_kills as t
from pipelines import precompute
made = t.recipe(Path(sys.argv[1]))
directory = Path(made.run_directory, "signals")
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
try:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    def lose_one():
        while len(list(directory.glob("begun-*"))) < 3:
            time.sleep(0.1)
        (directory / "lost").touch()
        cluster.remove_node(nodes[0], allow_graceful=False)
    threading.Thread(target=lose_one, daemon=True).start()
    precompute.SignalActor = t.SlowActor
    precompute.run(t.context(made))
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.drill
@pytest.mark.faults("a worker node removed", "signals")
@pytest.mark.timeout(600)
def test_a_node_killed_in_the_middle(undisturbed: Result, made: Recipe, fault_table: FaultTable) -> None:
    """Two nodes of one actor each, in a cluster of its own; one goes away for good when it has begun."""
    command = [sys.executable, "-c", NODES, made.storage]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert process.returncode == 0, process.stderr
    directory = Path(made.run_directory, "signals")
    begun = [path.name.split("-")[1] for path in directory.glob("begun-*")]
    assert (directory / "lost").exists() and len(begun) > len(set(begun)), "what the lost node had begun is done again"
    assert shards_of(context(made)) == undisturbed.shards
    seconds = min(begun_again(directory)) - (directory / "lost").stat().st_mtime
    fault_table.add("the other node computed its unfinished shards", "the same bytes", seconds)


def begun_again(directory: Path) -> Iterator[float]:
    """When what has left a mark begun-<number>-<pid> was begun a second time, by another process."""
    marks = sorted((path.stat().st_mtime, path.name.split("-")[1]) for path in directory.glob("begun-*"))
    seen: set[str] = set()
    for when, number in marks:
        if number in seen:
            yield when
        seen.add(number)


class SlowActor(SignalActor):
    """Leaves a mark when it begins a shard, and takes its time."""

    def compute(self, shard: int) -> None:
        Path(self.job.directory).mkdir(exist_ok=True)
        Path(self.job.directory, f"begun-{shard}-{os.getpid()}").touch()
        time.sleep(2)
        super().compute(shard)
