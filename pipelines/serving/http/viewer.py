"""The playground's page with one trace and without a model: for `rcd trace`. On this machine only."""

from __future__ import annotations

import json
import mimetypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pipelines.serving.http.page_files import FILES, HEADERS
from rcd_core.errors import UserError

VERSION = 1  # of the format of traces; static/trace_file.js reads it
_HOST = "127.0.0.1"


class TraceServer(ThreadingHTTPServer):
    """files: path -> (media type, content)."""

    daemon_threads = True

    def __init__(self, files: dict[str, tuple[str, bytes]], port: int) -> None:
        super().__init__((_HOST, port), _Handler)
        self.files = files
        self.last_request = time.monotonic()
        self.url = f"http://{_HOST}:{self.server_address[1]}/"

    def run(self, idle_s: float) -> None:
        """Answer requests until there was none for idle_s seconds."""
        self.timeout = min(1.0, idle_s)
        self.last_request = time.monotonic()
        while time.monotonic() - self.last_request < idle_s:
            self.handle_request()


class _Handler(BaseHTTPRequestHandler):
    server: TraceServer

    def do_GET(self) -> None:
        self.server.last_request = time.monotonic()
        found = self.server.files.get(self.path.partition("?")[0])
        self.send_response(404 if found is None else 200)
        media_type, content = found or ("text/plain", b"not found\n")
        for name, value in {**HEADERS, "Content-Type": media_type, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not printed."""


@contextmanager
def trace_server(trace: bytes, name: str, port: int) -> Iterator[TraceServer]:
    """A server of the page, bound but not running yet. trace: content of a file called `name`. port: 0 takes a free
    one. Raises UserError if the port is taken."""
    about = {"models": [], "trace": {"path": "playground/trace.json", "name": name}}
    files = {f"/playground/{file.name}": (_media_type(file.name), file.read_bytes()) for file in FILES.iterdir()}
    files["/"] = files["/playground/index.html"]
    files["/playground/models.json"] = ("application/json", json.dumps(about).encode())
    files["/playground/trace.json"] = ("application/json", trace)
    try:
        server = TraceServer(files, port)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port is {port}, which cannot be used ({error}); choose another, or leave it out") from error
    with server:
        yield server


def _media_type(name: str) -> str:
    """Browsers run no module of another type than this, whatever the machine's own table says."""
    return "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0] or "application/octet-stream"
