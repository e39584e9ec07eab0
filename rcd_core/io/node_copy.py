"""Checkpoints from object stores, downloaded once per node: processes that start there later find them on its disk.

A copy's name is made of the URI and of the names, sizes and times of its files, so that what has changed behind the
URI is fetched anew. Downloads go to a temporary name that is renamed when all is there; one process at a time does so,
and the others wait for it. Nothing is ever removed: $RCD_CACHE, by default ~/.cache/rcd, may be emptied at any time
between two loads.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rcd_core.errors import UserError
from rcd_core.io import storage

CACHE = "RCD_CACHE"
_Files = dict[str, tuple[int, int]]  # path below the checkpoint -> bytes, time of the last change in ns


def node_copy(checkpoint: str) -> str:
    """A local directory with the files behind a URI; paths come back as they are, and so do hub ids, for which the
    hub's client has a cache of its own. Raises UserError where the URI holds no files."""
    if not storage.is_uri(checkpoint) or checkpoint.startswith("file://"):
        return checkpoint.removeprefix("file://")
    root = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "rcd").expanduser() / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root / f"{_digest(checkpoint)}.lock"):
        while True:
            files = _list(checkpoint)
            copy = root / _digest(checkpoint, sorted(files.items())) / storage.basename(checkpoint)
            if _complete(copy, files):
                return str(copy)
            partial = root / f"{_digest(checkpoint)}.partial"  # one name: what a killed process has left goes too
            _download(checkpoint, partial / copy.name)
            if _list(checkpoint) == files:  # else somebody has written there meanwhile: of two versions each a part
                shutil.rmtree(copy.parent, ignore_errors=True)
                partial.rename(copy.parent)


def _list(checkpoint: str) -> _Files:
    from pyarrow import fs

    files, inner = storage.filesystem(checkpoint)
    try:
        found = files.get_file_info(fs.FileSelector(inner, allow_not_found=True, recursive=True))
    except OSError as error:
        raise UserError(f"checkpoint {checkpoint} cannot be read ({error}); check credentials") from error
    listed = {str(i.path)[len(inner) :].lstrip("/"): (int(i.size), int(i.mtime_ns or 0)) for i in found if i.is_file}
    if not listed:
        raise UserError(f"checkpoint {checkpoint} holds no files; name the directory of a checkpoint")
    return listed


def _download(checkpoint: str, destination: Path) -> None:
    from pyarrow import fs

    files, inner = storage.filesystem(checkpoint)
    shutil.rmtree(destination.parent, ignore_errors=True)
    destination.mkdir(parents=True)
    fs.copy_files(inner, str(destination), source_filesystem=files, destination_filesystem=fs.LocalFileSystem())


def _complete(copy: Path, files: _Files) -> bool:
    """Whether every file is there in its length: a machine that loses power can keep a name and lose the bytes."""
    return all((copy / name).is_file() and (copy / name).stat().st_size == size for name, (size, _) in files.items())


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # the kernel gives it back when the process ends, however it ends
        yield


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
