"""The node's cache of checkpoints in S3: one download for all processes, never partial, never outdated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rcd_core import load_model
from rcd_core.errors import UserError
from rcd_core.io import node_copy as module
from rcd_core.io import storage
from rcd_core.io.node_copy import CACHE, node_copy
from tests.conftest import ROOT
from tests.s3_server import s3_server

URI = "s3://bucket/runs/sdar_tiny"
TINY = ROOT / "tests" / "golden" / "sdar_tiny"
# A process that logs its download, which is slow enough for a second process to arrive.
SLOW = """
import sys, time
from rcd_core.io import node_copy as c
download = c._download
def slowly(checkpoint, destination):
    with open(sys.argv[2], "a") as log:
        log.write("download\\n")
    time.sleep(1)
    download(checkpoint, destination)
c._download = slowly
print(c.node_copy(sys.argv[1]))
"""
# A process that is killed after the first file.
KILLED = """
import os, signal, sys
import pyarrow.fs as fs
from rcd_core.io import storage
def some(source, destination, **_):
    open(destination + "/added.json", "wb").write(storage.read_bytes(sys.argv[1] + "/added.json"))
    os.kill(os.getpid(), signal.SIGKILL)
fs.copy_files = some
from rcd_core.io.node_copy import node_copy
node_copy(sys.argv[1])
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[dict[str, str]]:
    with s3_server("bucket") as environment:
        yield environment


@pytest.fixture
def cache(bucket: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and the checkpoint in the bucket."""
    storage.remove("s3://bucket/runs")
    storage.upload_dir(TINY, URI)
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "checkpoints"


def process(code: str, *words: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, *words], env=env, stdout=subprocess.PIPE, text=True)


def same(copy: str) -> bool:
    """Whether the copy equals the checkpoint in the bucket, file by file."""
    content = {path.name: path.read_bytes() for path in Path(copy).iterdir()}
    return content == {storage.basename(f): storage.read_bytes(f) for f in storage.list_files(URI)}


def test_uris_are_copied_and_local_paths_are_returned(cache: Path) -> None:
    copy = node_copy(URI)
    assert same(copy) and load_model(copy).info == load_model(TINY).info
    assert Path(copy).name == "sdar_tiny", "the name defines the block length of releases"
    assert [node_copy(s) for s in (str(TINY), f"file://{TINY}", "owner/name")] == [str(TINY), str(TINY), "owner/name"]


def test_two_processes_at_once_download_once(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    both = [process(SLOW, URI, str(log)) for _ in range(2)]
    first, second = (one.communicate(timeout=60)[0].strip() for one in both)
    assert [one.returncode for one in both] == [0, 0]
    assert first == second and same(first)
    assert log.read_text() == "download\n"


def test_a_changed_checkpoint_is_downloaded_again(cache: Path) -> None:
    before = node_copy(URI)
    storage.write_bytes(f"{URI}/config.json", (TINY / "config.json").read_bytes() + b"\n")
    storage.write_bytes(f"{URI}/added.json", b"{}")
    after = node_copy(URI)
    assert after != before and same(after)
    assert not (Path(before) / "added.json").exists(), "readers of the old copy are not disturbed"
    storage.remove(f"{URI}/added.json")
    assert same(node_copy(URI))


def test_a_checkpoint_replaced_during_the_download_is_not_mixed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download = module._download
    replaced: list[str] = []

    def meanwhile(checkpoint: str, destination: Path) -> None:
        download(checkpoint, destination)
        if not replaced:
            replaced.append(URI)
            storage.write_bytes(f"{URI}/config.json", (TINY / "config.json").read_bytes() + b"\n\n")

    monkeypatch.setattr(module, "_download", meanwhile)
    assert same(node_copy(URI)) and replaced
    assert len(list(cache.glob("*/sdar_tiny"))) == 1, "the mixture is not kept"


def test_a_killed_download_is_never_used(cache: Path) -> None:
    storage.write_bytes(f"{URI}/added.json", b"{}")
    killed = process(KILLED, URI)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    left = [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size]
    assert [path.name for path in left] == ["added.json"], "it was killed during the download"
    storage.remove(f"{URI}/added.json")
    assert same(node_copy(URI)) and not left[0].exists(), "its remains are not in the next copy"


def test_a_copy_that_has_lost_bytes_is_replaced(cache: Path) -> None:
    copy = Path(node_copy(URI))
    (copy / "model.safetensors").write_bytes(b"")
    assert node_copy(URI) == str(copy) and same(str(copy))


@pytest.mark.parametrize("uri", ["s3://bucket/runs/nothing", f"{URI}/config.json", "s3://elsewhere/x"])
def test_missing_and_unreadable_checkpoints_are_named(cache: Path, uri: str) -> None:
    with pytest.raises(UserError, match=f"checkpoint {uri}"):
        node_copy(uri)
