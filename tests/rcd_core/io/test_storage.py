"""Storage in a directory, by file://, on an S3 server and on pyarrow's mock file system."""

from __future__ import annotations

import errno
import hashlib
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from rcd_core.errors import UserError
from rcd_core.io import retries, storage
from rcd_core.io.node_copy import CACHE, node_copy
from tests.s3_server import s3_server


@pytest.fixture(scope="module")
def refuse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file exists, the S3 server answers every request with 503 SlowDown."""
    return tmp_path_factory.mktemp("s3") / "refuse"


@pytest.fixture(scope="module")
def bucket(refuse: Path) -> Iterator[str]:
    with s3_server("bucket", refuse):
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


def test_an_empty_file_is_a_file(base: str) -> None:
    storage.write_bytes(storage.join(base, "empty"), b"")
    assert storage.size(storage.join(base, "empty")) == 0


def test_a_write_to_a_bucket_is_one_request_under_its_own_name(bucket: str, refuse: Path) -> None:
    refuse.touch()
    try:
        with pytest.raises(OSError, match="SLOW_DOWN"):
            storage.write_bytes(f"{bucket}/put/x.json", b"{}")
        assert set(refuse.read_text().splitlines()) == {"PUT /bucket/put/x.json"}
    finally:
        refuse.unlink()


def test_a_job_waits_for_a_store_that_refuses_requests(
    bucket: str, refuse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a stream and after pickling, too. A program that is no job gives up soon."""
    path = storage.join(bucket, "patience", "x.bin")
    content = bytes(range(256)) * 4096
    storage.write_bytes(path, content)
    (tmp_path / "y.bin").write_bytes(content)
    monkeypatch.setattr(retries, "_job", threading.Event())
    retries.be_patient()
    patient = storage.open_input(path)
    files = pickle.loads(pickle.dumps(storage.filesystem(path)[0]))
    results: list[object] = []
    calls = (
        lambda: patient.read() == content,
        lambda: storage.sha256(path) == hashlib.sha256(content).hexdigest(),
        lambda: storage.list_files(storage.join(bucket, "patience")) != [],
        lambda: storage.write_bytes(storage.join(bucket, "patience", "z.bin"), b"z") is None,
        lambda: storage.upload_dir(tmp_path, storage.join(bucket, "patience")) is None,
        lambda: files.get_file_info("bucket/patience/x.bin").size == len(content),
    )
    refuse.touch()
    threads = [threading.Thread(target=lambda call=call: results.append(call()), daemon=True) for call in calls]
    try:
        for thread in threads:
            thread.start()
        with retries.hasty(), pytest.raises(OSError, match="503|SLOW_DOWN|SERVICE_UNAVAILABLE"):
            storage.exists(path)
        assert not results
    finally:
        refuse.unlink()
    for thread in threads:
        thread.join(timeout=30)
    assert results == [True] * len(calls)
    assert storage.read_bytes(storage.join(bucket, "patience", "y.bin")) == content


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTUNREACH])
def test_calls_are_repeated_after_errors_of_a_network_file_system(number: int) -> None:
    calls = []

    @retries.patiently
    def read(text: str) -> str:
        calls.append(text)
        if len(calls) < 3:
            raise OSError(number, "not now")
        return text

    assert read("a") == "a" and len(calls) == 3


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EIO])
def test_other_errors_are_raised_at_once(number: int) -> None:
    calls = []

    @retries.patiently
    def read() -> None:
        calls.append(1)
        raise OSError(number, "no")

    with pytest.raises(OSError, match="no"):
        read()
    assert len(calls) == 1


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "PATIENCE_S", 0.3)

    @retries.patiently
    def read() -> None:
        raise TimeoutError(errno.ETIMEDOUT, "never")

    with pytest.raises(TimeoutError):
        read()


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
