"""Storage in a directory, by file://, on an S3 server and on pyarrow's mock file system."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from rcd_core.errors import UserError
from rcd_core.io import storage
from rcd_core.io.node_copy import CACHE, node_copy
from tests.s3_server import s3_server


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server("bucket"):
        yield "s3://bucket"


@pytest.fixture(params=["local", "file", "mock", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    names = {"local": str(tmp_path), "file": f"file://{tmp_path}", "mock": f"mock://{tmp_path.name}"}
    name = names.get(request.param) or request.getfixturevalue("bucket")
    yield storage.join(name, "run")
    storage.remove(storage.join(name, "run"))


def test_json_files_and_directories(base: str) -> None:
    path = storage.join(base, "stage", "manifest.json")
    assert not storage.exists(path) and storage.list_files(base) == []
    with pytest.raises(FileNotFoundError):
        storage.read_json(path)
    for value in ({"a": [1, 2.5, "é"]}, {"b": None}):  # the second replaces the first
        storage.write_json(path, value)
        assert storage.read_json(path) == value
    storage.write_bytes(storage.join(base, "stage", "b.parquet"), b"PAR1")
    assert storage.list_files(storage.join(base, "stage"), ".json") == [path]
    names = [storage.basename(p) for p in storage.list_files(storage.join(base, "stage"))]
    assert names == ["b.parquet", "manifest.json"]
    assert storage.list_directories(base) == [storage.join(base, "stage")]
    assert storage.is_directory(base) and not storage.is_directory(path)
    assert storage.size(storage.join(base, "stage/b.parquet")) == 4
    assert storage.sha256(storage.join(base, "stage/b.parquet")) == hashlib.sha256(b"PAR1").hexdigest()
    storage.rename(path, storage.join(base, "elsewhere", "moved.json"))
    assert not storage.exists(path) and storage.read_json(storage.join(base, "elsewhere/moved.json")) == {"b": None}
    storage.remove(base)
    storage.remove(base)  # a second time: no error
    assert not storage.exists(base)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(base: str) -> None:
    path = storage.join(base, "x.bin")
    storage.write_bytes(path, b"old")
    with pytest.raises(RuntimeError), storage.open_output(path) as stream:
        stream.write(b"half of the n")
        raise RuntimeError
    assert storage.read_bytes(path) == b"old"
    files, inner = storage.filesystem(base)
    assert [info.base_name for info in files.get_file_info(fs.FileSelector(inner))] == ["x.bin"]


def test_upload_and_copy(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    source = tmp_path / "model"
    (source / "deep").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "deep" / "weights").write_bytes(b"\0\1")
    storage.upload_dir(source, storage.join(base, "model"))
    copy = Path(node_copy(storage.join(base, "model")))
    assert (copy / "config.json").read_text() == "{}" and (copy / "deep" / "weights").read_bytes() == b"\0\1"
    assert node_copy(storage.join(base, "model")) == str(copy)
    storage.write_bytes(storage.join(base, "model/config.json"), b'{"changed": 1}')
    assert (Path(node_copy(storage.join(base, "model"))) / "config.json").read_bytes() == b'{"changed": 1}'


def test_join_keeps_schemes_and_roots() -> None:
    assert storage.join("s3://bucket/runs/", "/demo", "x.json") == "s3://bucket/runs/demo/x.json"
    assert storage.join("/", "a") == "/a" and storage.join("/a/", "b/") == "/a/b"
    assert storage.basename("gs://bucket/runs/demo/") == "demo"


@pytest.mark.parametrize(
    ("path", "named"), [("runs/demo", "runs/demo"), ("nowhere://x/y", "nowhere://x"), ("hf://owner/name", "hf://owner")]
)
def test_bad_paths_are_named(path: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        storage.exists(path)


def test_broken_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"half')
    with pytest.raises(UserError, match=r"manifest\.json"):
        storage.read_json(str(tmp_path / "manifest.json"))
