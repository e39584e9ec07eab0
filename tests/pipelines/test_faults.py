"""A full disk, and results of another run in the way: one clear message, and then the same artefacts."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.recipe.load import dump_recipe
from pipelines.recipe.model import Recipe
from pipelines.run.driver import main
from tests.fault_table import FaultTable
from tests.pipelines.signal_run import Result, context, prepared, recipe, shards_of


def command(made: Recipe, *options: str) -> list[str]:
    path = Path(made.storage, f"{made.name}.yaml")
    path.write_text(dump_recipe(made))
    return ["--recipe", str(path), "--stages", "signals", *options]


# -- a full disk


class Disk:
    """A file system of its own in memory, of so many kB."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._run("mount", "-t", "tmpfs", "-o", "size=16384k", "tmpfs", str(path))

    def free(self, kb: int) -> None:
        """Let so much be left of it."""
        used = shutil.disk_usage(self.path).used // 1024
        self._run("mount", "-o", f"remount,size={used + kb}k", str(self.path))

    def remove(self) -> None:
        self._run("umount", "--lazy", str(self.path))

    def _run(self, *words: str) -> None:
        subprocess.run(words, check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        found = Disk(tmp_path / "disk")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a file system")
    yield found
    found.remove()


@pytest.mark.drill
@pytest.mark.faults("a full disk", "signals")
def test_signals_on_a_full_disk_go_on_when_there_is_room(
    undisturbed: Result, disk: Disk, capsys: pytest.CaptureFixture[str], fault_table: FaultTable
) -> None:
    made = recipe(disk.path)
    prepared(made)
    words = command(made)
    disk.free(60)  # kB; all shards together take more
    assert main(words) == 2
    message = capsys.readouterr().err
    (message,) = (line for line in message.splitlines() if line.startswith("error: "))
    assert "no space left" in message and "make room" in message, message
    found = shards_of(context(made))
    assert len(found) < len(undisturbed.shards) and found.items() <= undisturbed.shards.items(), "whole ones only"
    disk.free(8192)
    assert main(words) == 0
    assert shards_of(context(made)) == undisturbed.shards
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
    made: Recipe,
    in_process: list[int],
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    fault_table: FaultTable,
) -> None:
    other = recipe(tmp_path_factory.mktemp("other"), **changes)
    prepared(other)
    assert main(command(other)) == 0
    signals = Path(made.run_directory, "signals")
    shutil.copytree(Path(other.run_directory, "signals"), signals)
    before = shards_of(context(made))
    in_process.clear()
    capsys.readouterr()
    assert main(command(made)) == 2
    message = capsys.readouterr().err
    assert "holds results of other settings" in message and names in message and "--redo signals" in message, message
    assert shards_of(context(made)) == before and not in_process, "nothing was touched"
    assert main(command(made, "--redo", "signals")) == 0 and in_process
    fault_table.add("refused before any write; the message names the difference; --redo replaces it", "one message")
