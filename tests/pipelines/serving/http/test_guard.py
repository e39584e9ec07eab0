"""API keys, body size, request ids and metrics, in front of every route."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from pipelines.serving.backend import Overloaded
from pipelines.serving.http.app import create_app
from pipelines.serving.http.guard import ApiLimits
from tests.pipelines.serving.http.fake_backend import Echo, app_of

BODY = {"model": "m", "prompt": "p"}
KEYS = ("first-key", "second-key")


class Broken(Echo):
    """Neither ready nor able to report statistics."""

    async def ready(self) -> None:
        raise RuntimeError("still loading")

    async def statistics(self) -> dict[str, float]:
        raise RuntimeError("its replica died")


def client_of(limits: ApiLimits | None, **backends: Echo) -> TestClient:
    return TestClient(app_of(limits, **backends))


@pytest.mark.parametrize(
    "wrong",
    [None, "Bearer", "Bearer ", "Bearer wrong", "Basic first-key", "first-key", "Bearer first-key2", "Bearer é"],
)
def test_a_wrong_key_is_rejected(wrong: str | None) -> None:
    client = client_of(ApiLimits(api_keys=KEYS))
    headers = {} if wrong is None else {"Authorization": wrong.encode()}
    for path in ("/v1/completions", "/v1/models", "/v1/nowhere"):
        answer = client.request("POST" if path.endswith("completions") else "GET", path, headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.json()["error"]["type"] == "authentication_error"
        assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_a_key_opens_everything_and_is_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    limits = ApiLimits(api_keys=KEYS)
    client = client_of(limits)
    for key in KEYS:
        headers = {"Authorization": f"Bearer {key}"}
        assert client.post("/v1/completions", json=BODY, headers=headers).status_code == 200
        schema = client.get("/openapi.json", headers=headers).json()
        assert "HTTPBearer" in schema["components"]["securitySchemes"]
    assert not any(key in caplog.text + repr(limits) + limits.id for key in KEYS)
    assert len({limits.id, ApiLimits().id, replace(limits, open_state=True).id}) == 3


def test_pages_of_other_origins_are_let_in_by_name_only() -> None:
    """The browser's question needs no key, the request does; a refusal can be read by the page, too."""
    ask = {"Origin": "https://a.b", "Access-Control-Request-Method": "POST"}
    ask["Access-Control-Request-Headers"] = "authorization,content-type"
    path, key = "/v1/completions", {"Authorization": f"Bearer {KEYS[0]}"}
    client = client_of(ApiLimits(api_keys=KEYS, cors_origins=("https://a.b",)))
    asked = client.options(path, headers=ask)
    assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == "https://a.b"
    assert "authorization" in asked.headers["access-control-allow-headers"]
    for headers, status in ((key, 200), ({}, 401)):
        answer = client.post(path, json=BODY, headers={"Origin": "https://a.b", **headers})
        assert answer.status_code == status and answer.headers["access-control-allow-origin"] == "https://a.b"
    assert client.options(path, headers={**ask, "Origin": "https://c.d"}).status_code == 400
    other = client.post(path, json=BODY, headers={"Origin": "https://c.d", **key})
    assert "access-control-allow-origin" not in other.headers
    closed = client_of(ApiLimits(api_keys=KEYS))
    assert closed.options(path, headers=ask).status_code in (401, 405)
    assert "access-control-allow-origin" not in closed.post(path, json=BODY, headers={**key, **ask}).headers


PAGE = ("/", "/playground/main.js", "/playground/style.css")
STATE = ("/health", "/ready", "/metrics")
KEYED = (
    ("GET", "/v1/models"),
    ("GET", "/v1/models/m"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
    ("GET", "/playground/models.json"),
)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "p"}]}


def prefixed(limits: ApiLimits, how: str) -> tuple[TestClient, str]:
    """The application at /, mounted in another one, or behind a server that sets root_path as Ray Serve does."""
    app = app_of(limits)
    if how == "mounted":
        outer = Starlette(routes=[Mount("/outer", routes=[Mount("/rcd", app=app)])])
        return TestClient(outer), "/outer/rcd"
    return TestClient(app, root_path="/rcd" if how == "root_path" else ""), "/rcd" if how == "root_path" else ""


@pytest.mark.parametrize("how", ["at the root", "mounted", "root_path"])
@pytest.mark.parametrize("open_state", [False, True])
def test_every_route_but_the_page_needs_a_key_under_any_prefix(how: str, open_state: bool) -> None:
    client, prefix = prefixed(ApiLimits(api_keys=KEYS, open_state=open_state), how)
    routes = [*KEYED, *(("GET", path) for path in STATE)]
    assert {path for _, path in routes} >= set(app_of().openapi()["paths"]) - {"/v1/models/{model_id}"}
    key = {"Authorization": "Bearer second-key"}
    for method, path in routes:
        body = {"json": CHAT if "chat" in path else BODY} if method == "POST" else {}
        expected = 200 if open_state and path in STATE else 401
        for wrong in ({}, {"Authorization": "Bearer wrong"}):
            assert client.request(method, prefix + path, headers=wrong, **body).status_code == expected, path
        assert client.request(method, prefix + path, headers=key, **body).status_code == 200, path
    for path in PAGE:
        assert client.get(prefix + path).status_code == 200, path
    for path in ("/v1/models/", "//v1/models", "/playground/../v1/models", "/rcd/v1/models", "/playground"):
        assert client.get(prefix + path, follow_redirects=False).status_code in (401, 404), path


@pytest.mark.parametrize("how", ["at the root", "mounted", "root_path"])
def test_no_route_needs_a_key_without_keys(how: str) -> None:
    client, prefix = prefixed(ApiLimits(), how)
    for method, path in KEYED:
        body = {"json": CHAT if "chat" in path else BODY} if method == "POST" else {}
        assert client.request(method, prefix + path, **body).status_code == 200, path


def test_metrics_name_routes_alike_under_any_prefix() -> None:
    """By the route without the prefix, and one name for all paths that are none."""
    seen = set()
    for how in ("at the root", "mounted", "root_path"):
        client, prefix = prefixed(ApiLimits(), how)
        for method, path in KEYED:
            body = {"json": CHAT if "chat" in path else BODY} if method == "POST" else {}
            client.request(method, prefix + path, **body)
        for path in ("/v1/models/other", "/none", "/v1/none", "/playground/none.js", "/playground/style.css"):
            client.get(prefix + path)
        client.post(prefix + "/v1/completions", content=b"{")
        text = client.get(prefix + "/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("rcd_http_requests_total")]
        seen.add("\n".join(sorted(lines)))
    assert len(seen) == 1, seen
    routes = set(re.findall(r'route="([^"]*)"', seen.pop()))
    ours = {*app_of().openapi()["paths"], "/v1/models/{model_id:path}", "/openapi.json", "/playground/models.json"}
    assert routes <= ours | {"/playground", "none"}
    assert {"/v1/completions", "/v1/models/{model_id:path}", "none"} <= routes


def test_keys_of_the_environment_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCD_API_KEYS", "from-outside")
    client = client_of(None)
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "bearer from-outside"}).status_code == 200


def test_the_body_size_is_limited() -> None:
    client = client_of(ApiLimits(max_body_bytes=1000))
    long = b'{"model": "m", "prompt": "' + b"x" * 2000 + b'"}'

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(long), 100):
            yield long[start : start + 100]

    for content in (long, pieces()):
        answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413 and "1000" in answer.json()["error"]["message"]
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert client.post("/v1/completions", json=BODY).status_code == 200


def test_the_characters_of_all_choices_are_limited(echo: Echo) -> None:
    client = client_of(ApiLimits(), m=echo)
    long = "x" * (4 * 2**20 - 200)
    prompts: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/completions", {"prompt": long, "n": 128}, "prompt"),
        ("/v1/completions", {"prompt": [5] * 10**6, "n": 128}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}], "n": 128}, "messages"),
    ]
    for path, body, field in prompts:
        answer = client.post(path, json={"model": "m", **body})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field and "128" in answer.json()["error"]["message"]
    assert not echo.requests
    assert client.post("/v1/completions", json=BODY | {"n": 128}).status_code == 200


def test_every_answer_has_a_request_id() -> None:
    client = client_of(ApiLimits())
    for path in ("/health", "/v1/nowhere"):
        assert client.get(path, headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
    new = {
        client.get("/health", headers={"X-Request-Id": bad}).headers["X-Request-Id"] for bad in ("", "a b", "x" * 999)
    }
    assert len(new) == 3 and all(len(name) == 32 for name in new)
    broken = client.post("/v1/completions", json=BODY | {"prompt": "broken"}, headers={"X-Request-Id": "mine-2"})
    assert broken.status_code == 500 and broken.headers["X-Request-Id"] == "mine-2"
    behind_proxy = TestClient(create_app({}, {}, ApiLimits(), add_request_id=False))
    assert "X-Request-Id" not in behind_proxy.get("/health", headers={"X-Request-Id": "its-own"}).headers


def test_no_other_site_may_read() -> None:
    answer = client_of(ApiLimits()).get("/v1/models", headers={"Origin": "https://elsewhere.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_metrics_count_what_happened(caplog: pytest.LogCaptureFixture) -> None:
    client = client_of(ApiLimits(), m=Echo(), bad=Broken())
    for prompt in ("p", "forbidden", "full", "broken"):
        client.post("/v1/completions", json=BODY | {"prompt": prompt})
    client.post("/v1/completions", json=BODY | {"stream": True, "n": 2})
    client.post("/v1/completions", json=BODY | {"stream": True, "prompt": "lost"})
    assert "a replica died" in caplog.text
    assert client.get("/ready").status_code == 503 and "still loading" in client.get("/ready").text
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    values: dict[str, Any] = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    expected = {
        **{
            f'rcd_http_requests_total{{route="/v1/completions",status="{status}"}}': count
            for status, count in ((200, 3), (400, 1), (429, 1), (500, 1))
        },
        'rcd_http_failed_streams_total{status="503"}': 1,
        'rcd_http_tokens_total{kind="completion",model="m"}': 24,
        'rcd_http_tokens_total{kind="prompt",model="m"}': 6,
        "rcd_http_decodes_open": 0,
        'rcd_up{model="m"}': 1,
        'rcd_up{model="bad"}': 0,
        'rcd_running{model="m"}': 0,
        'rcd_echoes_total{model="m"}': 7,
    }
    assert {name: float(values[name]) for name in expected} == expected
    assert "# TYPE rcd_echoes_total counter" in answer.text


def test_the_schema_has_only_our_errors() -> None:
    schema = client_of(ApiLimits()).get("/openapi.json").json()
    operations = [operation for path in schema["paths"].values() for operation in path.values()]
    assert not any("422" in operation["responses"] for operation in operations)
    post = schema["paths"]["/v1/completions"]["post"]["responses"]
    assert set(post) == {"200", "400", "401", "404", "413", "429", "500", "503", "504"}
    assert set(post["200"]["content"]) == {"application/json", "text/event-stream"}
    assert schema["info"]["version"] == "1.2" and "securitySchemes" not in schema["components"]


def test_overloaded_can_be_pickled() -> None:
    again = pickle.loads(pickle.dumps(Overloaded(2.5)))
    assert again.retry_after_s == 2.5 and "2.5" in str(again)
