"""`rcd push`, against a hub of our own on loopback that takes commits as the real one does."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main as cli

TOKEN = "hf_" + "x" * 30


class Hub:
    """repos: name -> path -> content of what was committed. requests: (path, authorization)."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hub.requests.append((self.path, self.headers["Authorization"]))
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                status, answer = hub.answer(self.path, body)
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self) -> None:
                self.do_POST()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repos.setdefault(name, {})
            return 200, {"url": f"{self.url}/{name}", "name": name}
        name = "/".join(path.split("/")[3:5])
        if name == "me/taken":
            return 403, {"error": f"you may not write to {name} with {TOKEN}"}
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True}
        return 200, {"sha": "0" * 40, "siblings": [], "id": name, "auth": {"accessToken": {}}, "name": "me"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("# a model")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)))
    return tmp_path


def test_the_folder_is_committed(hub: Hub, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(checkpoint), "--repo", "me/model"]) == 0
    assert hub.repos["me/model"] == {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert "me/model" in capsys.readouterr().out
    changes = [sent for path, sent in hub.requests if "create" in path or "commit" in path]
    assert changes == [f"Bearer {TOKEN}"] * 2


def test_a_refusal_is_one_line_without_the_token(
    hub: Hub, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["push", str(checkpoint), "--repo", "me/taken"]) == 2
    said = capsys.readouterr().err
    assert "--repo me/taken" in said and len(said.splitlines()) == 1 and TOKEN not in said


def test_what_is_missing_is_named_first(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)

    def refused(*arguments: str) -> str:
        assert cli.main(["push", *arguments]) == 2
        return capsys.readouterr().err

    assert "HF_TOKEN" in refused(str(checkpoint), "--repo", "me/model")
    assert "--repo" in refused(str(checkpoint), "--repo", "model")
    assert "rcd export" in refused(str(tmp_path / "nothing"), "--repo", "me/model")
    (checkpoint / "README.md").unlink()
    assert "README.md" in refused(str(checkpoint), "--repo", "me/model")


def test_a_hub_that_is_not_there(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert cli.main(["push", str(checkpoint), "--repo", "me/model"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
