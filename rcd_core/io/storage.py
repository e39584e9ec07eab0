"""Files of a run by one kind of name: an absolute local path or a URI (s3://, gs://, file://, ...), through pyarrow.

Every write is atomic: the bytes go to a temporary name beside the destination, which is renamed when they are complete,
so that a reader, or a job that comes after a killed one, never meets half a file. Temporary names start with a dot and
`list_files` does not show them.

Who one is in an object store, and where it is if not the cloud's own (MinIO, say), is the environment's to tell: for S3
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL, on every node.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from rcd_core.errors import UserError

_CHUNK = 16 << 20  # each a request to an object store, one after another


def is_uri(path: str) -> bool:
    return "://" in path


def is_absolute(path: str) -> bool:
    """True for a path that means the same file in every process of a job: an absolute one or a URI."""
    return is_uri(path) or os.path.isabs(path)


def join(base: str, *parts: str) -> str:
    """`base` and `parts` with single slashes between; works on paths and URIs alike."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def basename(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


@lru_cache(maxsize=64)
def _root(root: str) -> Any:
    """The file system of "scheme://host", opened once per process (opening S3 looks up the bucket's region)."""
    import pyarrow as pa
    from pyarrow import fs

    try:
        return fs.FileSystem.from_uri(root + "/")[0]
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{root}: no such storage ({error}); use an absolute path, file://, s3:// or gs://") from error


def filesystem(path: str) -> tuple[Any, str]:
    """(pyarrow FileSystem, the path inside it). Raises UserError for a relative path or an unknown scheme."""
    path = path.removeprefix("file://")
    if not is_absolute(path):
        raise UserError(f"path {path!r} is relative, and a job runs in a temporary directory; give an absolute one")
    if not is_uri(path):
        return _root("file://"), path
    scheme, rest = path.split("://", 1)
    if scheme == "hf":
        raise UserError(f"{path}: hf:// names something on the hub, not a file; use an absolute path, s3:// or gs://")
    host = rest.split("/", 1)[0]
    # A bucket is the first part of the path inside an object store; the host of hdfs:// is not part of its paths.
    inner = rest.removeprefix(host) if scheme == "hdfs" else rest.strip("/")
    return _root(f"{scheme}://{host}"), inner


def _info(path: str) -> Any:
    files, inner = filesystem(path)
    return files.get_file_info(inner)


def _children(directory: str, recursive: bool = False) -> list[Any]:
    from pyarrow import fs

    files, inner = filesystem(directory)
    found = files.get_file_info(fs.FileSelector(inner, allow_not_found=True, recursive=recursive))
    return sorted(found, key=lambda info: str(info.path))


def exists(path: str) -> bool:
    """True for a file or a directory."""
    from pyarrow import fs

    return bool(_info(path).type != fs.FileType.NotFound)


def is_directory(path: str) -> bool:
    from pyarrow import fs

    return bool(_info(path).type == fs.FileType.Directory)


def size(path: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    found = _info(path).size
    if found is None:
        raise FileNotFoundError(path)
    return int(found)


def modified(path: str) -> int:
    """Time of the last change in nanoseconds, 0 where the storage does not say. Raises FileNotFoundError."""
    size(path)
    return int(_info(path).mtime_ns or 0)


def list_files(directory: str, suffix: str = "") -> list[str]:
    """Full names of the files directly in `directory` that end in `suffix`, sorted; [] when there is no directory."""
    return [join(directory, i.base_name) for i in _children(directory) if i.is_file and _shown(i.base_name, suffix)]


def list_directories(directory: str) -> list[str]:
    """Full names of the directories directly in `directory`, sorted; [] when there is none."""
    return [join(directory, i.base_name) for i in _children(directory) if not i.is_file and _shown(i.base_name)]


def _shown(name: str, suffix: str = "") -> bool:
    return not name.startswith(".") and name.endswith(suffix)


def open_input(path: str) -> Any:
    """A readable, seekable binary file (a pyarrow NativeFile). Raises FileNotFoundError."""
    files, inner = filesystem(path)
    return files.open_input_file(inner)


@contextmanager
def open_output(path: str) -> Iterator[BinaryIO]:
    """A binary file to write that appears under `path` when the block ends well, and not at all when it raises."""
    files, inner = filesystem(path)
    parent, _, name = inner.rpartition("/")
    _make_directory(files, parent)
    temporary = "/".join(part for part in (parent, f".{name}.{uuid.uuid4().hex[:8]}.tmp") if part)
    stream = files.open_output_stream(temporary)
    try:
        yield stream
        stream.close()
        if not is_uri(path):
            _sync(temporary)
        files.move(temporary, inner)
    except BaseException:
        with suppress(Exception):
            stream.close()
        with suppress(Exception):
            files.delete_file(temporary)
        raise


def _make_directory(files: Any, inner: str) -> None:
    if inner and files.type_name not in ("s3", "gcs", "abfs"):  # object stores have names only
        files.create_dir(inner, recursive=True)


def _sync(local: str) -> None:
    """Bytes before name: without it a power cut can leave the new name on an empty file."""
    descriptor = os.open(local, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str, data: bytes) -> None:
    with open_output(path) as stream:
        stream.write(data)


def read_bytes(path: str) -> bytes:
    with open_input(path) as stream:
        return bytes(stream.read())


def write_json(path: str, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: str) -> Any:
    """Raises FileNotFoundError, or UserError when the file holds no JSON."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}); mend or remove the file") from error


def remove(path: str) -> None:
    """Remove a file or a directory with all in it; nothing happens when there is none."""
    from pyarrow import fs

    files, inner = filesystem(path)
    kind = files.get_file_info(inner).type
    if kind == fs.FileType.Directory:
        files.delete_dir(inner)
    elif kind != fs.FileType.NotFound:
        files.delete_file(inner)


def rename(source: str, destination: str) -> None:
    """Move a file, or on a local disk a directory, within one file system; an existing file is replaced."""
    files, inner = filesystem(source)
    other, target = filesystem(destination)
    if not files.equals(other):
        raise ValueError(f"cannot rename {source} to {destination}: different file systems")
    _make_directory(files, target.rpartition("/")[0])
    files.move(inner, target)


def upload_dir(local_dir: str | Path, destination: str) -> None:
    """Copy the files of a local directory, in depth, to `destination`: each file atomically, in sorted order."""
    root = Path(local_dir)
    for source in sorted(p for p in root.rglob("*") if p.is_file()):
        with source.open("rb") as stream, open_output(join(destination, source.relative_to(root).as_posix())) as out:
            shutil.copyfileobj(stream, out, _CHUNK)


def sha256(path: str) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open_input(path) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
