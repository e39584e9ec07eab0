"""Checkpoints behind an S3, one copy per node: one download for all, never half of one, never an old one."""

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
# A process that writes a line when it downloads, which then takes long enough for another to come too.
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
# One that is killed when the first file is there.
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
    """Whether it is the checkpoint in the bucket, no file more or less."""
    found = {path.name: path.read_bytes() for path in Path(copy).iterdir()}
    return found == {storage.basename(f): storage.read_bytes(f) for f in storage.list_files(URI)}


def test_a_copy_is_the_checkpoint_and_local_ones_stay_where_they_are(cache: Path) -> None:
    copy = node_copy(URI)
    assert same(copy) and load_model(copy).info == load_model(TINY).info
    assert Path(copy).name == "sdar_tiny", "by its name a released checkpoint is known"
    assert [node_copy(s) for s in (str(TINY), f"file://{TINY}", "owner/name")] == [str(TINY), str(TINY), "owner/name"]


def test_two_processes_at_once_download_once(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    both = [process(SLOW, URI, str(log)) for _ in range(2)]
    first, second = (one.communicate(timeout=60)[0].strip() for one in both)
    assert [one.returncode for one in both] == [0, 0]
    assert first == second and same(first)
    assert log.read_text() == "download\n"


def test_what_has_changed_is_fetched_anew(cache: Path) -> None:
    before = node_copy(URI)
    storage.write_bytes(f"{URI}/config.json", (TINY / "config.json").read_bytes() + b"\n")
    storage.write_bytes(f"{URI}/added.json", b"{}")
    after = node_copy(URI)
    assert after != before and same(after)
    assert not (Path(before) / "added.json").exists(), "who reads the old copy is not disturbed"
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
    assert [path.name for path in left] == ["added.json"], "it was killed in the middle"
    storage.remove(f"{URI}/added.json")
    assert same(node_copy(URI)) and not left[0].exists(), "what it has left is no part of the next copy"


def test_a_copy_that_has_lost_bytes_is_replaced(cache: Path) -> None:
    copy = Path(node_copy(URI))
    (copy / "model.safetensors").write_bytes(b"")
    assert node_copy(URI) == str(copy) and same(str(copy))


@pytest.mark.parametrize("uri", ["s3://bucket/runs/nothing", "s3://bucket/runs/sdar_tiny/config.json"])
def test_where_there_is_no_checkpoint_it_is_said(cache: Path, uri: str) -> None:
    with pytest.raises(UserError, match=f"checkpoint {uri} holds no files; name the directory"):
        node_copy(uri)


def test_who_may_not_read_is_told_so(cache: Path, bucket: dict[str, str]) -> None:
    with pytest.raises(UserError, match="checkpoint s3://elsewhere/x"):
        node_copy("s3://elsewhere/x")
