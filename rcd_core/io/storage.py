"""Files on local disks and object stores, named by absolute paths or URIs (s3://, gs://, file://, ...), by pyarrow.
Those of a data set on the Hugging Face hub, hf://datasets/OWNER/NAME@REVISION/PATH, can be read.

Every write is atomic, so that readers never see a partial file. On a file system bytes go to a temporary name in the
same directory, which is renamed when they are complete; such names start with a dot, and `list_files` skips them. In an
object store a put is atomic; bytes are collected on the local disk first.

Storage that does not answer for a while is asked again: see retries.py.

Credentials and endpoints come from the environment of every node, for S3 AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_DEFAULT_REGION and AWS_ENDPOINT_URL.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from rcd_core.errors import UserError
from rcd_core.io.retries import is_patient, patiently

_CHUNK = 16 << 20  # bytes per request to an object store


def is_uri(path: str) -> bool:
    return "://" in path


def is_absolute(path: str) -> bool:
    """True for an absolute path or a URI, which name the same file in every process of a job."""
    return is_uri(path) or os.path.isabs(path)


def join(base: str, *parts: str) -> str:
    """Join parts of a path or URI with single slashes."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def basename(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


@lru_cache(maxsize=64)
def _root(root: str, patient: bool) -> Any:
    """The file system of "scheme://host", opened once per process (opening S3 looks up the bucket's region)."""
    import pyarrow as pa

    from rcd_core.io.object_stores import open_root

    if root == "hf://datasets":
        from huggingface_hub import HfFileSystem
        from pyarrow import fs

        return fs.PyFileSystem(fs.FSSpecHandler(HfFileSystem()))
    try:
        return open_root(root + "/", patient)
    except pa.ArrowInvalid as error:
        raise UserError(f"{root}: cannot be opened ({error}); use an absolute path, file://, s3:// or gs://") from error
    except OSError as error:
        raise UserError(
            f"{root} is not reachable from here ({error}); check its name, the network, and the credentials and "
            "endpoint in the environment"
        ) from error


def filesystem(path: str) -> tuple[Any, str]:
    """(pyarrow FileSystem, the path inside it). Raises UserError for a relative path or an unknown scheme."""
    path = path.removeprefix("file://")
    if not is_absolute(path):
        raise UserError(f"path {path!r} is relative, but jobs run in temporary directories; give an absolute path")
    if not is_uri(path):
        return _root("file://", False), path
    scheme, rest = path.split("://", 1)
    host = rest.split("/", 1)[0]
    if scheme == "hf" and host != "datasets":
        raise UserError(f"{path}: hf:// is not a file system; use an absolute path, s3:// or gs://")
    # pyarrow's paths in object stores start with the bucket; those in HDFS do not contain the host.
    inner = rest.removeprefix(host) if scheme == "hdfs" else rest.strip("/")
    return _root(f"{scheme}://{host}", is_patient()), inner


@patiently
def _info(path: str) -> Any:
    files, inner = filesystem(path)
    return files.get_file_info(inner)


@patiently
def _children(directory: str) -> list[Any]:
    from pyarrow import fs

    files, inner = filesystem(directory)
    entries = files.get_file_info(fs.FileSelector(inner, allow_not_found=True))
    return sorted(entries, key=lambda info: str(info.path))


def exists(path: str) -> bool:
    """True for a file or a directory."""
    from pyarrow import fs

    return bool(_info(path).type != fs.FileType.NotFound)


def is_directory(path: str) -> bool:
    from pyarrow import fs

    return bool(_info(path).type == fs.FileType.Directory)


def size(path: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    num_bytes = _info(path).size
    if num_bytes is None:
        raise FileNotFoundError(path)
    return int(num_bytes)


def modified(path: str) -> int:
    """Modification time in nanoseconds, 0 if the storage has none. Raises FileNotFoundError."""
    size(path)
    return int(_info(path).mtime_ns or 0)


def list_files(directory: str, suffix: str = "") -> list[str]:
    """Full names of the files directly in `directory` that end in `suffix`, sorted; [] if it does not exist."""
    return [join(directory, i.base_name) for i in _children(directory) if i.is_file and _visible(i.base_name, suffix)]


def list_directories(directory: str) -> list[str]:
    """Full names of the directories directly in `directory`, sorted; [] if it does not exist."""
    return [join(directory, i.base_name) for i in _children(directory) if not i.is_file and _visible(i.base_name)]


def listing(directory: str) -> dict[str, Any]:
    """Name -> pyarrow FileInfo (size, mtime_ns) of the files directly in `directory`, with temporary ones."""
    return {str(info.base_name): info for info in _children(directory) if info.is_file}


def _visible(name: str, suffix: str = "") -> bool:
    return not name.startswith(".") and name.endswith(suffix)


@patiently
def open_input(path: str) -> Any:
    """A readable, seekable binary file (a pyarrow NativeFile). Raises FileNotFoundError."""
    files, inner = filesystem(path)
    return files.open_input_file(inner)


@contextmanager
def open_output(path: str) -> Iterator[BinaryIO]:
    """A binary file to write. It appears at `path` when the block ends, and not at all if the block raises."""
    files, inner = filesystem(path)
    if _is_object_store(files):
        # Not the store's own stream: it would complete the object also when the block raises.
        with tempfile.SpooledTemporaryFile(_CHUNK) as buffer:
            yield buffer  # type: ignore[misc]
            buffer.seek(0)
            _put(files, inner, buffer)
        return
    parent, _, name = inner.rpartition("/")
    temporary = "/".join(part for part in (parent, f".{name}.{uuid.uuid4().hex[:8]}.tmp") if part)
    stream = _create(files, parent, temporary)
    try:
        yield stream
        stream.close()
        if not is_uri(path):
            _sync(temporary)
        patiently(files.move)(temporary, inner)
    except BaseException:
        with suppress(Exception):
            stream.close()
        with suppress(Exception):
            files.delete_file(temporary)
        raise


def is_object_store(path: str) -> bool:
    """Object stores have no directories, no rename and no temporary files of killed writers."""
    return _is_object_store(filesystem(path)[0])


def _is_object_store(files: Any) -> bool:
    return files.type_name in ("s3", "gcs", "abfs")


def _put(files: Any, inner: str, source: Any) -> None:
    with files.open_output_stream(inner) as stream:
        shutil.copyfileobj(source, stream, _CHUNK)


@patiently
def _create(files: Any, parent: str, name: str) -> Any:
    if parent:
        files.create_dir(parent, recursive=True)
    return files.open_output_stream(name)


def _sync(local: str) -> None:
    """Flush before the rename: otherwise a power failure may leave the new name on an empty file."""
    descriptor = os.open(local, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@patiently
def write_bytes(path: str, data: bytes) -> None:
    with open_output(path) as stream:
        stream.write(data)


@patiently
def read_bytes(path: str) -> bytes:
    with open_input(path) as stream:
        return bytes(stream.read())


def write_json(path: str, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: str) -> Any:
    """Raises FileNotFoundError, or UserError if the file is not JSON."""
    content = read_bytes(path)
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}); fix or remove the file") from error


@patiently
def remove(path: str) -> None:
    """Remove a file or a directory tree, if it exists."""
    from pyarrow import fs

    files, inner = filesystem(path)
    kind = files.get_file_info(inner).type
    if kind == fs.FileType.Directory:
        files.delete_dir(inner)
    elif kind != fs.FileType.NotFound:
        files.delete_file(inner)


@patiently
def rename(source: str, destination: str) -> None:
    """Move a file (on local disks also a directory) within one file system. Replaces an existing file."""
    files, inner = filesystem(source)
    other, target = filesystem(destination)
    if not files.equals(other):
        raise ValueError(f"cannot rename {source} to {destination}: different file systems")
    if not _is_object_store(files):
        files.create_dir(target.rpartition("/")[0], recursive=True)
    files.move(inner, target)


def upload_dir(local_dir: str | Path, destination: str) -> None:
    """Copy a local directory tree to `destination`: file by file in sorted order, each file atomically."""
    root = Path(local_dir)
    for source in sorted(p for p in root.rglob("*") if p.is_file()):
        upload_file(source, join(destination, source.relative_to(root).as_posix()))


@patiently
def upload_file(local: Path, destination: str) -> None:
    files, inner = filesystem(destination)
    with local.open("rb") as stream:
        if _is_object_store(files):
            _put(files, inner, stream)
        else:
            with open_output(destination) as out:
                shutil.copyfileobj(stream, out, _CHUNK)


@patiently
def sha256(path: str) -> str:
    """Hex digest of a file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with open_input(path) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
