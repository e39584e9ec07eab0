"""A cache of checkpoints from object stores on each node's disk, shared by all processes of the node.

The key of a copy is a hash of the URI and of the names, sizes and times of its files, so that a changed checkpoint is
downloaded again. One process downloads at a time, into a directory that is renamed when complete; the others wait.
Copies are never removed. $RCD_CACHE (default ~/.cache/rcd) may be emptied at any time between two loads.
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
_Files = dict[str, tuple[int, int]]  # relative path -> bytes, modification time in ns


def node_copy(checkpoint: str) -> str:
    """A local directory with the files of a URI. Raises UserError if there are none.

    Paths are returned unchanged, and so are hub ids, which the hub's client caches.
    """
    if not storage.is_uri(checkpoint) or checkpoint.startswith("file://"):
        return checkpoint.removeprefix("file://")
    root = cache_directory("checkpoints")
    with locked(root / f"{digest(checkpoint)}.lock"):
        while True:
            files = _list(checkpoint)
            copy = root / digest(checkpoint, sorted(files.items())) / storage.basename(checkpoint)
            if _complete(copy, files):
                return str(copy)
            partial = root / f"{digest(checkpoint)}.partial"  # a fixed name: replaces what a killed process left
            _download(checkpoint, partial / copy.name)
            if _list(checkpoint) == files:  # else it changed meanwhile and the copy mixes two versions: retry
                shutil.rmtree(copy.parent, ignore_errors=True)
                partial.rename(copy.parent)


def cache_directory(name: str) -> Path:
    """A directory of this node's cache, which exists."""
    root = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "rcd").expanduser() / name
    root.mkdir(parents=True, exist_ok=True)
    return root


def _list(checkpoint: str) -> _Files:
    from pyarrow import fs

    files, inner = storage.filesystem(checkpoint)
    try:
        entries = files.get_file_info(fs.FileSelector(inner, allow_not_found=True, recursive=True))
    except OSError as error:
        raise UserError(f"checkpoint {checkpoint} cannot be read ({error}); check credentials") from error
    listed = {str(i.path)[len(inner) :].lstrip("/"): (int(i.size), int(i.mtime_ns or 0)) for i in entries if i.is_file}
    if not listed:
        raise UserError(f"checkpoint {checkpoint} has no files; give the directory of a checkpoint")
    return listed


def _download(checkpoint: str, destination: Path) -> None:
    from pyarrow import fs

    files, inner = storage.filesystem(checkpoint)
    shutil.rmtree(destination.parent, ignore_errors=True)
    destination.mkdir(parents=True)
    fs.copy_files(inner, str(destination), source_filesystem=files, destination_filesystem=fs.LocalFileSystem())


def _complete(copy: Path, files: _Files) -> bool:
    """Whether every file exists with its size: after a power failure a file may have lost its content."""
    return all((copy / name).is_file() and (copy / name).stat().st_size == size for name, (size, _) in files.items())


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """One process of the node at a time."""
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # the kernel releases it whenever the process ends
        yield


def digest(*parts: object) -> str:
    """24 hex digits."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
