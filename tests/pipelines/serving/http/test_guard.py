"""What stands before every route: keys, sizes, names of requests; and what is told of it all on /metrics."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from pipelines.serving.backend import Overloaded, ServedModel
from pipelines.serving.http.app import create_app
from pipelines.serving.http.guard import ApiLimits, api_keys
from rcd_core.decode_settings import DecodeSettings
from rcd_core.errors import UserError
from tests.pipelines.serving.http.fake_backend import Echo

BODY = {"model": "m", "prompt": "p"}
KEYS = ("first-key", "second-key")


class Broken(Echo):
    """Neither ready nor able to say anything."""

    async def ready(self) -> None:
        raise RuntimeError("still loading")

    async def statistics(self) -> dict[str, float]:
        raise RuntimeError("its replica died")


def client_of(limits: ApiLimits | None, **backends: Echo) -> TestClient:
    models = {
        name: ServedModel(backend=backend, defaults=DecodeSettings(), created=7)
        for name, backend in (backends or {"m": Echo()}).items()
    }
    return TestClient(create_app(models, {"version": "1.2"}, limits))


def test_a_key_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    limits = ApiLimits(api_keys=KEYS)
    client = client_of(limits)
    for wrong in (
        None,
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Basic first-key",
        "first-key",
        "Bearer first-key2",
        "Bearer é",
    ):
        headers = {} if wrong is None else {"Authorization": wrong.encode()}
        for path in ("/v1/completions", "/v1/models", "/v1/nowhere"):
            answer = client.request("POST" if path.endswith("completions") else "GET", path, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.json()["error"]["type"] == "authentication_error"
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    for key in KEYS:
        headers = {"Authorization": f"Bearer {key}"}
        assert client.post("/v1/completions", json=BODY, headers=headers).status_code == 200
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    assert "HTTPBearer" in client.get("/openapi.json").json()["components"]["securitySchemes"]
    assert not any(key in caplog.text + repr(limits) for key in KEYS)


def test_keys_come_from_the_environment_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n one \n\ntwo  # a guest's\n", encoding="utf-8")
    assert api_keys({"RCD_API_KEYS": "a, b", "RCD_API_KEYS_FILE": str(file)}) == ("a", "b", "one", "two")
    assert api_keys({}) == ()
    file.write_text("# none yet\n", encoding="utf-8")
    for environment, says in (
        ({"RCD_API_KEYS": " , "}, "RCD_API_KEYS holds no key"),
        ({"RCD_API_KEYS_FILE": str(file)}, "RCD_API_KEYS_FILE .* holds no key"),
        ({"RCD_API_KEYS_FILE": str(tmp_path / "none")}, "cannot be read"),
    ):
        with pytest.raises(UserError, match=says):
            api_keys(environment)
    monkeypatch.setenv("RCD_API_KEYS", "from-outside")
    client = client_of(None)
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "bearer from-outside"}).status_code == 200


def test_a_body_has_a_largest_size() -> None:
    client = client_of(ApiLimits(max_body_bytes=1000))
    long = b'{"model": "m", "prompt": "' + b"x" * 2000 + b'"}'

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(long), 100):
            yield long[start : start + 100]

    for content in (long, pieces()):
        answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413 and "larger than 1000 bytes" in answer.json()["error"]["message"]
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert client.post("/v1/completions", json=BODY).status_code == 200


def test_every_answer_has_the_name_of_its_request() -> None:
    client = client_of(ApiLimits())
    for path in ("/health", "/v1/nowhere"):
        assert client.get(path, headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
    made = {
        client.get("/health", headers={"X-Request-Id": bad}).headers["X-Request-Id"] for bad in ("", "a b", "x" * 999)
    }
    assert len(made) == 3 and all(len(name) == 32 for name in made)
    broken = client.post("/v1/completions", json=BODY | {"prompt": "broken"}, headers={"X-Request-Id": "mine-2"})
    assert broken.status_code == 500 and broken.headers["X-Request-Id"] == "mine-2"


def test_behind_a_proxy_requests_have_names_already() -> None:
    app = create_app({}, {}, ApiLimits(), name_requests=False)
    assert "X-Request-Id" not in TestClient(app).get("/health", headers={"X-Request-Id": "its-own"}).headers


def test_no_other_site_may_read() -> None:
    answer = client_of(ApiLimits()).get("/v1/models", headers={"Origin": "https://elsewhere.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_what_happened_is_told_on_metrics(caplog: pytest.LogCaptureFixture) -> None:
    client = client_of(ApiLimits(), m=Echo(), bad=Broken())
    for prompt in ("p", "forbidden", "full", "broken"):
        client.post("/v1/completions", json=BODY | {"prompt": prompt})
    client.post("/v1/completions", json=BODY | {"stream": True, "n": 2})
    client.post("/v1/completions", json=BODY | {"stream": True, "prompt": "lost on the way"})
    assert "a replica died" in caplog.text
    assert client.get("/ready").status_code == 503 and "still loading" in client.get("/ready").text
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    told: dict[str, Any] = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    route = 'rcd_http_requests_total{route="/v1/completions",status='
    assert {s: told[f'{route}"{s}"}}'] for s in (200, 400, 429, 500)} == {
        200: "3.0",
        400: "1.0",
        429: "1.0",
        500: "1.0",
    }
    assert told['rcd_http_failed_streams_total{status="503"}'] == "1.0"
    assert told['rcd_http_tokens_total{kind="completion",model="m"}'] == "24.0"
    assert told['rcd_http_tokens_total{kind="prompt",model="m"}'] == "6.0"
    assert told["rcd_http_decodes_open"] == "0.0"
    assert told['rcd_up{model="m"}'] == "1.0" and told['rcd_up{model="bad"}'] == "0.0"
    assert told['rcd_running{model="m"}'] == "0.0" and told['rcd_asked_total{model="m"}'] == "7.0"
    assert "# TYPE rcd_asked_total counter" in answer.text


def test_the_description_tells_of_our_errors_only() -> None:
    schema = client_of(ApiLimits()).get("/openapi.json").json()
    for path in schema["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
    post = schema["paths"]["/v1/completions"]["post"]["responses"]
    assert set(post) == {"200", "400", "401", "404", "413", "429", "500", "503", "504"}
    assert set(post["200"]["content"]) == {"application/json", "text/event-stream"}
    assert schema["info"]["version"] == "1.2" and "securitySchemes" not in schema["components"]


def test_overloaded_survives_the_way_between_processes() -> None:
    again = pickle.loads(pickle.dumps(Overloaded(2.5)))
    assert again.retry_after_s == 2.5 and "try again in 2.5 s" in str(again)
