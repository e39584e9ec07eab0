"""Who may ask for how much: body size, deadline and API keys, and the middleware that stands before every route."""

from __future__ import annotations

import hmac
import os
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.http.errors import ApiError, api_error
from pipelines.serving.http.metrics import ApiMetrics
from rcd_core.errors import UserError

KEYS, KEYS_FILE = "RCD_API_KEYS", "RCD_API_KEYS_FILE"
REQUEST_ID = "X-Request-Id"
_GOOD_ID = re.compile(r"[\x21-\x7e]{1,128}")  # printable: it comes back in a header, and goes to logs


@dataclass(frozen=True, kw_only=True)
class ApiLimits:
    """timeout_s: seconds a request may take, and what its own timeout_s may be at most. ping_s: silence after which a
    stream says that it lives. max_body_bytes: of a request. api_keys: one of them must come with requests to /v1; none:
    everybody may ask."""

    timeout_s: float = 600.0
    ping_s: float = 10.0
    max_body_bytes: int = 4 * 2**20
    api_keys: tuple[str, ...] = field(default=(), repr=False)

    def allows(self, authorization: str | None) -> bool:
        """Whether the Authorization header bears one of the keys. Takes as long for a key that is nearly right."""
        scheme, _, key = (authorization or "").partition(" ")
        given = key.strip().encode()
        same = [hmac.compare_digest(given, known.encode()) for known in self.api_keys]
        return not self.api_keys or (scheme.lower() == "bearer" and any(same))


def api_keys(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys of RCD_API_KEYS (comma separated) and of the file RCD_API_KEYS_FILE (one a line, # begins a comment).
    Raises UserError where a variable is set but names no key: the server would be open to all."""
    found: list[str] = []
    if (listed := environment.get(KEYS)) is not None:
        found += _named(listed.split(","), KEYS)
    if (path := environment.get(KEYS_FILE)) is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{KEYS_FILE} is {path!r}, which cannot be read: {error}; name a text file") from error
        found += _named([line.partition("#")[0] for line in lines], f"{KEYS_FILE} ({path})")
    return tuple(found)


def _named(keys: list[str], where: str) -> list[str]:
    found = [key.strip() for key in keys if key.strip()]
    if not found:
        raise UserError(f"{where} holds no key; give at least one, or leave it out to let everybody ask")
    return found


class Guard:
    """ASGI middleware: names the request, asks for the key, bounds the body, counts the answer, and gives what fails
    unexpectedly OpenAI's shape. name_requests False: a proxy in front does that."""

    def __init__(self, app: ASGIApp, limits: ApiLimits, metrics: ApiMetrics, name_requests: bool) -> None:
        self.app, self.limits, self.metrics, self.name_requests = app, limits, metrics, name_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        started, status = time.monotonic(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.name_requests:
                    MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            self._admit(scope, headers)
            await self.app(scope, self._bounded(receive), named)
        except Exception as error:
            refusal = api_error(error)
            if status:  # the answer has begun; the connection is all that is left to break
                raise
            await refusal.response()(scope, receive, named)
        finally:
            self.metrics.answered(scope, status, time.monotonic() - started)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        if scope["path"].startswith("/v1/") and not self.limits.allows(headers.get("Authorization")):
            raise ApiError(
                401,
                "no valid API key; send `Authorization: Bearer <key>`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get("Content-Length", "")
        if length.isdecimal() and int(length) > self.limits.max_body_bytes:
            raise ApiError(413, self._too_large(), code="body_too_large")

    def _bounded(self, receive: Receive) -> Receive:
        """For bodies that come without their length."""
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.limits.max_body_bytes:
                raise HTTPException(413, self._too_large())  # the one exception that passes through body parsing
            return message

        return counted

    def _too_large(self) -> str:
        return f"the body is larger than {self.limits.max_body_bytes} bytes"
