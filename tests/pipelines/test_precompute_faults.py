"""Faults in the stage `signals` on real Ray: errors, kills between any two writes, a full disk, foreign results."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import precompute
from pipelines.ray_cluster import waiting
from pipelines.recipe.load import dump_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.driver import main
from pipelines.signals import files as signal_files
from pipelines.signals.actor import SignalActor
from rcd_core.errors import UserError
from rcd_core.io import storage
from tests.fault_table import FaultTable
from tests.pipelines.signal_run import Result, check_rows, context, make_recipe, prepare_run, printed, shards_of

# -- errors


def test_an_error_in_the_code_is_tried_once_more(
    ray_cluster: str, prepared: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompute, "SignalActor", BrokenActor)
    with pytest.raises(Exception, match="a mistake in the code"):
        precompute.run(context(prepared))
    calls = Counter(Path(prepared.storage, "calls").read_text().split())
    assert max(calls.values()) == 2 and len(calls) <= 4, calls


def test_waiting_is_announced_and_ends_after_the_timeout(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompute, "SignalActor", SleepingActor)
    monkeypatch.setattr(waiting, "EVERY_S", 0.5)
    recipe = make_recipe(tmp_path, resources={"no_progress_timeout_s": 3.0})
    prepare_run(recipe)
    ctx = context(recipe)
    with pytest.raises(UserError, match=r"no shard was finished for 3 s, resources\.no_progress_timeout_s"):
        precompute.run(ctx)
    assert "signals: waiting for a shard, of up to 2 x (CPU 1), since" in printed(ctx) and "(0 of" in printed(ctx)


# -- kills


class BrokenActor(SignalActor):
    def compute(self, shard: int) -> Any:
        with (Path(self.job.directory).parents[1] / "calls").open("a") as calls:
            calls.write(f"{shard}\n")
        raise ZeroDivisionError("a mistake in the code")


class SleepingActor(SignalActor):
    def compute(self, shard: int) -> Any:
        time.sleep(600)


class KillingActor(SignalActor):
    """Sends SIGKILL once between two writes of a shard, at the moment that <storage>/kills.json gives for the shard.

    The victim is this process, or the one named in the file.
    """

    def compute(self, shard: int) -> Any:
        here = Path(self.job.directory).parents[1]
        kills = json.loads((here / "kills.json").read_text())
        moment, marker = kills["moments"].get(str(shard)), here / f"killed-{shard}"

        def reached(here: str) -> None:
            if here == moment and not marker.exists():
                marker.touch()
                os.kill(kills["victim"] or os.getpid(), signal.SIGKILL)
                time.sleep(1.0)  # Ray then ends this actor too, between the two writes

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "_sync", lambda path: reached(f"before the rename of the {_kind(path)}"))
            patch.setattr(signal_files.ShardWriter, "write", _then(signal_files.ShardWriter.write, reached, "during"))
            real = signal_files.write_sidecar
            patch.setattr(signal_files, "write_sidecar", lambda *a: (reached("before the sidecar"), real(*a))[1])
            sidecar = super().compute(shard)
        reached("after the sidecar")
        return sidecar


def _kind(temporary: str) -> str:
    return "sidecar" if ".json." in temporary else "shard"


def _then(function: Any, reached: Callable[[str], None], moment: str) -> Any:
    def wrapped(*arguments: Any) -> Any:
        result = function(*arguments)
        reached(moment)
        return result

    return wrapped


MOMENTS = (
    "during",
    "before the rename of the shard",
    "before the sidecar",
    "before the rename of the sidecar",
    "after the sidecar",
)


def kills(recipe: Recipe, moments: dict[int, str], victim: int | None = None) -> None:
    storage.write_json(f"{recipe.storage}/kills.json", {"moments": moments, "victim": victim})


@pytest.mark.drill
def test_actors_killed_between_any_two_writes(
    undisturbed: Result, prepared: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kill per shard, at five different moments. Ray restarts the actor, which computes the shard again."""
    monkeypatch.setattr(precompute, "SignalActor", KillingActor)
    kills(prepared, dict(enumerate(MOMENTS)))
    ctx = context(prepared)
    assert precompute.run(ctx) == undisturbed.summary
    assert len(list(Path(prepared.storage).glob("killed-*"))) == len(MOMENTS) and shards_of(ctx) == undisturbed.shards
    assert not list(Path(ctx.directory).glob(".*"))


DRIVER = """
import os, sys
from pathlib import Path
import tests.pipelines.test_precompute_faults as t
from pipelines import precompute
from pipelines.signals import files as signal_files
from pipelines.ray_cluster.connection import connect
recipe, shard = t.make_recipe(Path(sys.argv[1])), int(sys.argv[2])
t.kills(recipe, {shard: sys.argv[3]}, os.getpid())
connect()
signal_files.remove_shard(recipe.run_directory + "/signals", shard)  # an actor of a killed driver may finish it
precompute.SignalActor = t.KillingActor
precompute.run(t.context(recipe))
"""


def kill_the_driver(recipe: Recipe, shard: int, moment: str) -> None:
    """SIGKILL to a driver in another process, while an actor is between two writes."""
    command = [sys.executable, "-c", DRIVER, recipe.storage, str(shard), moment]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr


def check_after_kills(recipe: Recipe, undisturbed: Result) -> None:
    ctx = context(recipe)
    summary = precompute.run(ctx)
    assert summary == undisturbed.summary and shards_of(ctx) == undisturbed.shards
    check_rows(ctx, summary)
    assert not list(Path(ctx.directory).glob(".*"))


@pytest.mark.drill
def test_the_driver_killed_before_a_sidecar(undisturbed: Result, prepared: Recipe) -> None:
    kill_the_driver(prepared, 2, "before the sidecar")
    assert len(shards_of(context(prepared))) < len(undisturbed.shards)
    check_after_kills(prepared, undisturbed)


@pytest.mark.drill
@pytest.mark.faults("the driver killed between any two writes", "signals")
@pytest.mark.timeout(600)
def test_the_driver_killed_between_any_two_writes(
    undisturbed: Result, prepared: Recipe, fault_table: FaultTable
) -> None:
    """Killed five times in a row, each time one shard later."""
    for shard, moment in enumerate(MOMENTS):
        kill_the_driver(prepared, shard, moment)
    check_after_kills(prepared, undisturbed)
    fault_table.add("the next job kept the complete shards and computed the rest", "the same bytes")


# -- a full disk


def command(recipe: Recipe, *options: str) -> list[str]:
    path = Path(recipe.storage, f"{recipe.name}.yaml")
    path.write_text(dump_recipe(recipe))
    return ["--recipe", str(path), "--stages", "signals", *options]


class Disk:
    """A mounted file system in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._run("mount", "-t", "tmpfs", "-o", "size=16384k", "tmpfs", str(path))

    def free(self, kb: int) -> None:
        """Resize it so that this much is free."""
        used = shutil.disk_usage(self.path).used // 1024
        self._run("mount", "-o", f"remount,size={used + kb}k", str(self.path))

    def remove(self) -> None:
        self._run("umount", "--lazy", str(self.path))

    def _run(self, *words: str) -> None:
        subprocess.run(words, check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        disk = Disk(tmp_path / "disk")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no permission to mount a file system")
    yield disk
    disk.remove()


@pytest.mark.drill
@pytest.mark.faults("a full disk", "signals")
def test_after_a_full_disk_signals_resume(
    undisturbed: Result, disk: Disk, capsys: pytest.CaptureFixture[str], fault_table: FaultTable
) -> None:
    recipe = make_recipe(disk.path)
    prepare_run(recipe)
    words = command(recipe)
    disk.free(60)  # kB; all shards together take more
    assert main(words) == 2
    message = capsys.readouterr().err
    (message,) = (line for line in message.splitlines() if line.startswith("error: "))
    assert "no space left" in message and "make room" in message, message
    shards = shards_of(context(recipe))
    assert len(shards) < len(undisturbed.shards) and shards.items() <= undisturbed.shards.items(), "complete ones"
    disk.free(8192)
    assert main(words) == 0
    assert shards_of(context(recipe)) == undisturbed.shards
    fault_table.add("ended with one message; the same command resumed after the finished shards", "the same bytes")


# -- results of another run


@pytest.mark.faults("a manifest of another run", "signals")
@pytest.mark.parametrize(
    ("changes", "names"),
    [({"signals": {"top_k": 4}}, "signals: signals.top_k: 4 there, 8 now"), ({"noise": {"draws": 2}}, "noise.draws")],
    ids=["other settings", "other noise"],
)
def test_a_manifest_of_another_run_is_refused(
    changes: dict[str, dict[str, int]],
    names: str,
    ray_cluster: str,
    prepared: Recipe,
    in_process: list[int],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    fault_table: FaultTable,
) -> None:
    other = make_recipe(tmp_path_factory.mktemp("other"), **changes)
    prepare_run(other)
    assert main(command(other)) == 0
    signals = Path(prepared.run_directory, "signals")
    shutil.copytree(Path(other.run_directory, "signals"), signals)
    before = shards_of(context(prepared))
    in_process.clear()
    capsys.readouterr()
    assert main(command(prepared)) == 2
    message = capsys.readouterr().err
    assert "holds results of other settings" in message and names in message and "--redo signals" in message, message
    assert shards_of(context(prepared)) == before and not in_process
    assert main(command(prepared, "--redo", "signals")) == 0 and in_process
    fault_table.add("refused before any write; the message names the difference; --redo replaces it", "one message")
