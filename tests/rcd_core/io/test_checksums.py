"""SHA256SUMS next to weights: written with them, checked before they are read."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rcd_core import UserError, load_model
from rcd_core.alpha import LearnedAlpha
from rcd_core.io import checksums

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """In several shards, with an added network."""
    model = load_model(GOLDEN / "sdar_tiny")
    model.learned_alpha = LearnedAlpha()
    model.save_pretrained(tmp_path / "saved", max_shard_bytes=100_000)
    return tmp_path / "saved"


def flip(file: Path) -> None:
    """The last byte, which belongs to a tensor and not to the header."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)


def test_sha256sum_reads_it(saved: Path) -> None:
    listed = (saved / checksums.FILE).read_text()
    assert all(file.name in listed for file in saved.glob("*.safetensors")) and "rcd_alpha" in listed
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--strict", "--quiet", "-c", checksums.FILE], cwd=saved, check=True)


@pytest.mark.parametrize("name", ["model-00002-of-*.safetensors", "rcd_alpha.safetensors"])
def test_flipped_bytes_are_refused(name: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model(saved)
    [file] = saved.glob(name)
    flip(file)
    with pytest.raises(UserError, match=f"{file.name} has changed .*--no-verify.*remove SHA256SUMS"):
        load_model(saved)
    monkeypatch.setenv(checksums.SWITCH, "0")
    load_model(saved)


def test_a_checkpoint_of_others_has_no_digests(saved: Path) -> None:
    (saved / checksums.FILE).unlink()
    flip(next(saved.glob("model-00002*")))
    load_model(saved)


def test_a_damaged_list_is_named(saved: Path) -> None:
    (saved / checksums.FILE).write_bytes(b"\xff\xfe nothing")
    with pytest.raises(UserError, match="SHA256SUMS is damaged"):
        load_model(saved)


def test_saving_again_lists_the_new_files(saved: Path) -> None:
    model = load_model(saved)
    model.save_pretrained(saved)
    assert (saved / checksums.FILE).read_text().count("model") == 1
    load_model(saved)


def test_the_hubs_cache_names_files_by_their_digest(saved: Path, tmp_path: Path) -> None:
    """As its client lays it out: a snapshot of links, large files to blobs named by their sha256."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in saved.iterdir():
        if file.name == checksums.FILE:
            continue
        large = file.suffix == ".safetensors"
        blob = blobs / (hashlib.sha256 if large else hashlib.sha1)(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    assert load_file(snapshot / "rcd_alpha.safetensors")
    load_model(snapshot)
    flip((snapshot / "rcd_alpha.safetensors").resolve())
    with pytest.raises(UserError, match="rcd_alpha.safetensors has changed .*blob"):
        load_model(snapshot)
