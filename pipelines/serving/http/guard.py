"""Limits of the HTTP interface (body size, deadline, API keys), and the middleware in front of every route."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
import uuid
from dataclasses import dataclass, field

from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.http.errors import ApiError, api_error
from pipelines.serving.http.metrics import ApiMetrics

REQUEST_ID = "X-Request-Id"
PAGE = ("", "/")  # the playground; "" redirects to it
STATIC, MODELS = "/playground/", "/playground/models.json"  # the page's files need no key, its list of models does
STATE = ("/health", "/ready", "/metrics")
_VALID_ID = re.compile(r"[\x21-\x7e]{1,128}")  # printable ASCII: it is sent back in a header and logged


@dataclass(frozen=True, kw_only=True)
class ApiLimits:
    """timeout_s: deadline of a request in seconds, and the largest timeout_s that a request may set. ping_s: silence
    after which a stream sends a comment. max_body_bytes: of a request. max_chars: characters and token ids of its
    prompts, counted once per choice, since every choice is sent to a replica. api_keys: every request except for the
    page must bring one of them; if empty, no key is needed. open_state: /health, /ready and /metrics need no key.
    allow_without_keys: no keys are needed beyond this machine either. cors_origins: of web pages that may call the API
    from a browser."""

    timeout_s: float = 600.0
    ping_s: float = 10.0
    max_body_bytes: int = 4 * 2**20
    max_chars: int = 4 * 2**20
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    open_state: bool = False
    allow_without_keys: bool = False
    cors_origins: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Identifies the limits without revealing the keys."""
        doors = (self.open_state, self.allow_without_keys, *self.cors_origins)
        values = (self.timeout_s, self.max_body_bytes, *doors, *sorted(self.api_keys))
        return hashlib.sha256(repr(values).encode()).hexdigest()

    def needs_key(self, scope: Scope) -> bool:
        """Whether the request needs a key: every route does unless it is listed as open. Compares the path that the
        router matches, which has no route prefix."""
        path = get_route_path(scope)
        if not self.api_keys or path in PAGE or (self.open_state and path in STATE):
            return False
        return path == MODELS or not path.startswith(STATIC)

    def allows(self, authorization: str | None) -> bool:
        """Whether the Authorization header has one of the keys. Compares in constant time."""
        scheme, _, key = (authorization or "").partition(" ")
        sent = key.strip().encode()
        matches = [hmac.compare_digest(sent, known.encode()) for known in self.api_keys]
        return not self.api_keys or (scheme.lower() == "bearer" and any(matches))


class Guard:
    """ASGI middleware: adds the request id, checks the API key, limits the body, counts the request, and turns
    unexpected exceptions into OpenAI's error shape. add_request_id False: a proxy in front adds it."""

    def __init__(self, app: ASGIApp, limits: ApiLimits, metrics: ApiMetrics, add_request_id: bool) -> None:
        self.app, self.limits, self.metrics, self.add_request_id = app, limits, metrics, add_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope.pop("route", None)  # of an application that mounts this one; the metrics would take it for ours
        headers = Headers(scope=scope)
        sent_id = headers.get(REQUEST_ID, "")
        request_id = sent_id if _VALID_ID.fullmatch(sent_id) else uuid.uuid4().hex
        started, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.add_request_id:
                    MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            self._check(scope, headers)
            await self.app(scope, self._limited(receive), send_with_id)
        except Exception as error:
            refusal = api_error(error)
            if status:  # the response has started: all that is left is to break the connection
                raise
            await refusal.response()(scope, receive, send_with_id)
        finally:
            self.metrics.answered(scope, status, time.monotonic() - started)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if self.limits.needs_key(scope) and not self.limits.allows(headers.get("Authorization")):
            raise ApiError(
                401,
                "no valid API key; send `Authorization: Bearer <key>`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("Content-Length", "")
        if length.isdecimal() and int(length) > self.limits.max_body_bytes:
            raise ApiError(413, self._too_large(), code="body_too_large")

    def _limited(self, receive: Receive) -> Receive:
        """For bodies without Content-Length."""
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.limits.max_body_bytes:
                raise HTTPException(413, self._too_large())  # the only exception that FastAPI's body parsing passes on
            return message

        return counted

    def _too_large(self) -> str:
        return f"the body is larger than {self.limits.max_body_bytes} bytes"
