"""cluster/litellm.yaml: LiteLLM's proxy on loopback in front of the HTTP interface, with limits for each key."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import yaml

from pipelines.serving.http.guard import ApiLimits
from tests.cluster.files import CLUSTER
from tests.pipelines.serving.http.fake_backend import Echo, app_of
from tests.pipelines.serving.serve_run import free_port

# A directory with litellm[proxy], because its pins are not those of this package: pip install --target DIR ...
LITELLM = os.environ.get("RCD_TEST_LITELLM", "")
ENDPOINT_KEY = "the-endpoint-s-key"
KEYS = {"key-a": {"rpm_limit": 3}, "key-b": {"rpm_limit": 100}, "key-c": {"tpm_limit": 30}}
pytestmark = [
    pytest.mark.drill,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not Path(LITELLM, "litellm").is_dir() or not LITELLM, reason="RCD_TEST_LITELLM is not set"),
]


@contextmanager
def endpoint() -> Iterator[tuple[str, Echo]]:
    """The real HTTP application over a backend without a model, which needs a key."""
    backend, port = Echo(), free_port()
    app = app_of(ApiLimits(api_keys=(ENDPOINT_KEY,)), rcd=backend)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}", backend
    finally:
        server.should_exit = True
        thread.join(timeout=30)


@dataclass
class Gateway:
    url: str
    backend: Echo

    def complete(self, key: str, **more: Any) -> httpx.Response:
        body = {"model": "rcd", "messages": [{"role": "user", "content": "hello"}], **more}
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=120, trust_env=False)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    directory, port = tmp_path_factory.mktemp("gateway"), free_port()
    (directory / "keys.yaml").write_text(yaml.safe_dump(KEYS))
    shutil.copy(CLUSTER / "litellm_keys.py", directory)
    with endpoint() as (url, backend):
        config = (CLUSTER / "litellm.yaml").read_text().replace("http://127.0.0.1:8000", url)
        (directory / "litellm.yaml").write_text(config)
        own = {"RCD_KEY": ENDPOINT_KEY, "LITELLM_KEYS_FILE": str(directory / "keys.yaml"), "PYTHONPATH": LITELLM}
        own |= {"LITELLM_MASTER_KEY": f"sk-{secrets.token_hex(32)}"}
        own |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
        start = "from litellm import run_server; run_server()"
        options = ["--config", str(directory / "litellm.yaml"), "--host", "127.0.0.1", "--port", str(port)]
        with (directory / "log").open("w") as log:
            environment = {**os.environ, **own}
            process = subprocess.Popen(
                [sys.executable, "-c", start, *options], cwd=directory, env=environment, stdout=log, stderr=log
            )
            try:
                found = Gateway(f"http://127.0.0.1:{port}", backend)
                wait_for(found, process, directory / "log")
                yield found
            finally:
                process.terminate()
                process.wait(timeout=30)


def wait_for(gateway: Gateway, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 900
    while True:
        try:
            if httpx.get(f"{gateway.url}/health/liveliness", timeout=5, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)


def test_an_answer_and_a_stream_pass_through(gateway: Gateway) -> None:
    answer = gateway.complete("key-b")
    assert answer.status_code == 200, answer.text
    assert "hello" in answer.json()["choices"][0]["message"]["content"] and answer.json()["usage"]["total_tokens"] == 11
    stream = gateway.complete("key-b", stream=True)
    assert stream.status_code == 200 and stream.text.rstrip().endswith("data: [DONE]")


def test_only_the_keys_of_the_file_are_known(gateway: Gateway) -> None:
    before = len(gateway.backend.requests)
    for key in ("key", "key-", ENDPOINT_KEY):
        refused = gateway.complete(key)
        assert refused.status_code == 401 and ENDPOINT_KEY not in refused.text
    assert len(gateway.backend.requests) == before


@pytest.mark.parametrize("key", ["key-a", "key-c"])
def test_more_requests_or_tokens_of_a_key_than_its_limit_are_refused(gateway: Gateway, key: str) -> None:
    """Of each key by itself. Three requests, or 30 tokens, of which an answer has 11, suffice for the first at least. A
    new minute may begin in between, so at most twice as many pass."""
    answers = [gateway.complete(key).status_code for _ in range(9)]
    assert answers[0] == 200 and set(answers) == {200, 429} and answers.count(200) <= 6
    assert gateway.complete("key-b").status_code == 200
