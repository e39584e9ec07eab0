"""A local S3 server: moto on a free loopback port, in its own process. It can refuse requests for a while, or delay
each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pyarrow.fs import FileSystem

from rcd_core.io import storage

ROOT = Path(__file__).resolve().parents[1]
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@contextmanager
def s3_server(
    bucket: str, refuse: Path | None = None, latency_s: float = 0.0, in_memory: bool = False
) -> Iterator[dict[str, str]]:
    """Serves an empty bucket. Yields the environment variables that point to it, and sets them in this process
    meanwhile.

    refuse: while this file exists, every request is answered with 503 SlowDown and adds a line to it. latency_s: added
    to every request. in_memory: the server of benchmarks (benchmarks/memory_s3.py), which is much faster, instead of
    moto; it cannot refuse.

    pyarrow, and Ray through it, reads them when it opens an s3:// URI.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-m", "tests.s3_server", str(port), str(refuse or ""), str(latency_s)]
    if in_memory:
        command = [sys.executable, "-m", "tests.benchmarks.memory_s3", str(port), str(latency_s)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(server, port)
        with patch.dict(os.environ, environment):
            storage._root.cache_clear()  # an earlier server's
            FileSystem.from_uri(f"s3://{bucket}?allow_bucket_creation=true")[0].create_dir(bucket)
            yield environment
    finally:
        storage._root.cache_clear()
        server.terminate()
        server.wait(timeout=10)


def _wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, "the S3 server has not come up"
            time.sleep(0.05)


def _serve(port: int, refuse: str, latency_s: float) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import run_simple

    moto = DomainDispatcherApplication(create_backend_app)

    def answer(environ: dict[str, Any], start: Any) -> Any:
        time.sleep(latency_s)
        if not refuse or not os.path.exists(refuse):
            return moto(environ, start)
        with open(refuse, "a") as log:
            log.write(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}\n")
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(_SLOW_DOWN)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [_SLOW_DOWN]

    run_simple("127.0.0.1", port, answer, threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
