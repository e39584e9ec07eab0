"""SHA256SUMS: digests of a checkpoint's weight files, written with them and checked before they are read.

The file has the format of the program sha256sum, so `sha256sum -c SHA256SUMS` checks it as well. A file in the cache of
the hub's client needs none: its blob is named by its digest. The check reads every byte once, which also brings the
file into memory for the load: 1 GB a second and thread on a server CPU with instructions for SHA and other work.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rcd_core.errors import UserError
from rcd_core.io import storage

FILE = "SHA256SUMS"
SWITCH = "RCD_VERIFY"  # 0: files are not checked
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_THREADS = 4  # hashlib hashes without Python's lock


def write(directory: Path, files: Iterable[Path]) -> None:
    """Write the digests of files in `directory`. Call it when they are complete."""
    partial = directory / f"{FILE}.partial"
    partial.write_text(listing(files), encoding="utf-8")
    os.replace(partial, directory / FILE)


def listing(files: Iterable[Path]) -> str:
    """The content of SHA256SUMS for these files."""
    ordered = sorted(files)
    return "".join(f"{digest}  {file.name}\n" for file, digest in zip(ordered, _digests(ordered), strict=True))


def verify(directory: Path, files: Iterable[Path]) -> None:
    """Raise UserError for a file whose bytes are not those that were written. A file without a stored digest passes,
    and so does every file where $RCD_VERIFY is 0."""
    if os.environ.get(SWITCH) == "0":
        return
    stated = _stated(directory)
    expected = {file: digest for file in files if (digest := stated.get(file.name) or _blob(file))}
    for (file, stored), actual in zip(expected.items(), _digests(list(expected)), strict=True):
        if actual != stored:
            where = FILE if file.name in stated else "the name of its blob in the hub's cache"
            raise UserError(
                f"{file} has changed since it was written: its sha256 is {actual[:12]}..., {where} says "
                f"{stored[:12]}...; copy, download or train it again. To load it as it is: --no-verify, in a recipe or "
                f"a Serve config verify_weights: false; if the change was meant, remove {FILE}"
            )


def joined(digests: Sequence[str]) -> str:
    """One digest for several files: that of the only one, or of their digests in order."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _digests(files: list[Path]) -> list[str]:
    with ThreadPoolExecutor(_THREADS, "sha256") as pool:
        return list(pool.map(storage.sha256, (str(file.absolute()) for file in files)))


def _stated(directory: Path) -> dict[str, str]:
    """File name -> digest."""
    path = directory / FILE
    if not path.exists():
        return {}
    matches = [_LINE.fullmatch(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    if None in matches:
        raise UserError(f"{path} is damaged; copy or download it again, or remove it to load without a check")
    return {match[2]: match[1] for match in matches if match}


def _blob(file: Path) -> str | None:
    """The digest of a large file in the hub's cache. Small ones are named by another one."""
    real = file.resolve()
    return real.name if real.parent.name == "blobs" and _DIGEST.fullmatch(real.name) else None
