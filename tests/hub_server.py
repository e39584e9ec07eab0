"""A Hugging Face hub on loopback: data sets at one commit, as far as its client needs them to list and read files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """data sets by owner/name. read: (data set, revision, path) of every file that was read."""

    repositories: dict[str, tuple[dict[str, bytes], dict[str, Any]]] = field(default_factory=dict)
    read: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, name: str, files: dict[str, bytes], **card: Any) -> str:
        """Add a data set with the metadata of its card. Returns its commit."""
        self.repositories[name] = (files, card)
        return self.commit(name)

    def commit(self, name: str) -> str:
        files, card = self.repositories[name]
        content = repr((sorted(files.items()), sorted(card.items())))
        return hashlib.sha1(content.encode()).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serves at $HF_ENDPOINT, which conftest.py sets before the client is imported, here and in Ray's workers."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", urlsplit(os.environ["HF_ENDPOINT"]).port or 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name, revision = (api[1], api[3]) if api else (file[1], file[2]) if file else ("", None)
        if name not in self.hub.repositories or revision not in (None, "main", self.hub.commit(name)):
            code = "RepoNotFound" if name not in self.hub.repositories else "RevisionNotFound"
            return self._send(404, b"", {"X-Error-Code": code})
        files, card = self.hub.repositories[name]
        if file:
            return self._file(name, str(revision), file[3], files)
        assert api
        if api[2] != "tree":
            siblings = [{"rfilename": path} for path in files]
            facts = {"id": name, "sha": self.hub.commit(name), "siblings": siblings, "cardData": card}
            return self._send(200, json.dumps(facts).encode())
        prefix = f"{api[4]}/" if api[4] else ""
        inside = [path for path in files if path.startswith(prefix)]
        entries = [
            {"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40}
            for path in inside
            if "/" not in path[len(prefix) :]
        ]
        directories = {prefix + path[len(prefix) :].split("/")[0] for path in inside if "/" in path[len(prefix) :]}
        entries += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(directories)]
        return self._send(200, json.dumps(entries).encode())

    def _file(self, name: str, revision: str, path: str, files: dict[str, bytes]) -> None:
        self.hub.read.append((name, revision, path))
        content, status, headers = files[path], 200, {}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            content, status = content[first : last + 1], 206
        self._send(status, content, headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
