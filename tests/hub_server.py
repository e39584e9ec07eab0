"""A Hugging Face hub on loopback: data sets and models, as far as its client needs them to list and read files."""

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
    """repositories: data sets and models by owner/name, with all their commits. read: (repository, revision, path) of
    every file that was read. tokens: which a request for a gated repository must bring, by owner/name."""

    repositories: dict[str, dict[str, tuple[dict[str, bytes], dict[str, Any]]]] = field(default_factory=dict)
    read: list[tuple[str, str, str]] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, files: dict[str, bytes], **card: Any) -> str:
        """Add a repository with the metadata of its card, or another commit of it. Returns the commit."""
        content = repr((sorted(files.items()), sorted(card.items())))
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.repositories[name] = {**self.repositories.get(name, {}), commit: (files, card)}
        return commit

    def commit(self, name: str) -> str:
        """The main branch."""
        return list(self.repositories[name])[-1]


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
        api = re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path)
        file = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name, revision = (api[1], api[3]) if api else (file[1], file[2]) if file else ("", None)
        token = self.hub.tokens.get(name)
        if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
            return self._send(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": f"{name} is restricted"})
        commits = self.hub.repositories.get(name, {})
        commit = self.hub.commit(name) if commits and revision in (None, "main") else str(revision)
        if commit not in commits:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound" if commits else "RepoNotFound"})
        files, card = commits[commit]
        if file:
            return self._file(name, str(revision), file[3], files, commit)
        assert api
        if api[2] != "tree":
            siblings = [{"rfilename": path} for path in files]
            facts = {"id": name, "sha": commit, "siblings": siblings, "cardData": card}
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

    def _file(self, name: str, revision: str, path: str, files: dict[str, bytes], commit: str) -> None:
        if self.command == "GET":
            self.hub.read.append((name, revision, path))
        content, status = files[path], 200
        headers = {"X-Repo-Commit": commit, "ETag": hashlib.sha1(content).hexdigest()}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
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
