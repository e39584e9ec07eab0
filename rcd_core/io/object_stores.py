"""pyarrow file systems that wait for an object store.

S3 uses Arrow's strategy "default", whose pauses double from 25 ms on. Arrow's strategy "standard", which S3FileSystem
uses unless told otherwise, never gets back the 100 retries that a file system starts with (measured with pyarrow 26).
"""

from __future__ import annotations

from typing import Any

from pyarrow import fs

from rcd_core.io.retries import PATIENCE_S

_SECONDS = 2  # for a client that is not patient
_ATTEMPTS = {False: 7, True: 17}  # of S3: 2 s and 27 min


def open_root(root: str, patient: bool) -> Any:
    """The file system of "scheme://host/". Raises ArrowInvalid or OSError."""
    if root.startswith(("gs://", "gcs://")):
        root += f"?retry_limit_seconds={PATIENCE_S if patient else _SECONDS:.0f}"
    files = fs.FileSystem.from_uri(root)[0]
    if not isinstance(files, fs.S3FileSystem):
        return files
    options: dict[str, Any] = files.__reduce__()[1][0]  # what pyarrow pickles: all options but the strategy
    # A small file is one request instead of three.
    return S3({**options, "allow_delayed_open": True}, _ATTEMPTS[patient])


class S3(fs.S3FileSystem):  # type: ignore[misc]
    """An S3FileSystem that keeps its number of attempts when it is pickled, as Ray Train does."""

    def __init__(self, options: dict[str, Any], attempts: int) -> None:
        super().__init__(**options, retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=attempts))
        self.arguments = (options, attempts)

    def __reduce__(self) -> Any:
        return S3, self.arguments
