"""All errors of the HTTP interface, in OpenAI's shape: {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
import logging
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pipelines.recipe.files import suggestion
from pipelines.serving.backend import DecodingFailed, Overloaded, Unavailable
from pipelines.serving.http.bodies import (
    MAX_INT,
    MAX_STOPS,
    ChatRequest,
    CompletionRequest,
    Message,
    Request,
    StreamOptions,
    TextPart,
)
from pipelines.serving.http.sse import ClientGone
from rcd_core.errors import UserError

# status -> meaning, and the `code` that may come with it
ERRORS = {
    400: ("A field is invalid or unknown; `param` names it.", "unknown_field"),
    401: ("No valid API key.", "invalid_api_key"),
    404: ("No such model.", "model_not_found"),
    413: ("The body is too large.", "body_too_large"),
    429: ("The queue is full; `Retry-After` says when to retry.", "queue_full"),
    500: ("The server failed.", None),
    503: ("The model is not available.", "unavailable"),
    504: ("The deadline has passed.", "timeout"),
}
CLIENT_GONE = 499  # appears only in the metrics
_SHORT = reprlib.Repr()  # of invalid values, however long or deep
_SHORT.maxstring = 120

# Requirements of fields with several types; pydantic would complain once per type.
_REQUIREMENTS = {
    "prompt": f"it must be a text, texts, token ids (0 to {MAX_INT}), or lists of token ids, and not be empty",
    "stop": f"it must be a text or at most {MAX_STOPS} texts",
    "content": "it must be a text or a list of text parts",
}
_BODIES = (CompletionRequest, ChatRequest, Message, TextPart, StreamOptions)
_FIELDS = {name for body in _BODIES for name in body.model_fields}


class ErrorDetail(BaseModel):
    message: str = Field(description="What is wrong and what to do, in one line.")
    type: str = Field(description="Kind of error, given by the status.")
    param: str | None = Field(description="The invalid field.")
    code: str | None = Field(description="Machine-readable reason.")


class ErrorBody(BaseModel):
    error: ErrorDetail


class ApiError(Exception):
    """An error response."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def type(self) -> str:
        by_status = {401: "authentication_error", 429: "rate_limit_error"}
        return by_status.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(json.dumps(self.body()), self.status, self.headers, "application/json")


def api_error(error: Exception) -> ApiError:
    """The error response of any exception. Unexpected exceptions are logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error), _field_of(str(error)))
    if isinstance(error, Overloaded):
        seconds = max(1, math.ceil(error.retry_after_s))
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(seconds)})
    if isinstance(error, TimeoutError):
        return ApiError(504, str(error) or "the model did not answer in time", code="timeout")
    if isinstance(error, Unavailable):
        return ApiError(503, str(error) or "no replica of the model can answer", code="unavailable")
    if isinstance(error, DecodingFailed):
        return ApiError(500, str(error))
    if isinstance(error, ClientGone):
        return ApiError(CLIENT_GONE, "the client has disconnected")
    logging.getLogger("rcd.http").error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed: {type(error).__name__}; see its log")


def shape_errors(app: FastAPI) -> None:
    """Install the handlers for the exceptions of routes. The middleware handles the others."""

    async def on_error(_: HttpRequest, error: Exception) -> Response:
        return api_error(error).response()

    for kind in (ApiError, UserError, Overloaded, Unavailable, TimeoutError, ClientGone):
        app.add_exception_handler(kind, on_error)

    @app.exception_handler(RequestValidationError)
    async def on_bad_body(http: HttpRequest, error: RequestValidationError) -> Response:
        return _explain(error, ChatRequest if "/chat/" in http.url.path else CompletionRequest).response()

    @app.exception_handler(HTTPException)
    async def on_http_error(http: HttpRequest, error: HTTPException) -> Response:
        message = f"{http.method} {http.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response()


def _field_of(message: str) -> str | None:
    """Messages of UserErrors begin with the name of their field."""
    first = message.split(" ", 1)[0]
    return first if first in CompletionRequest.model_fields or first in ChatRequest.model_fields else None


def _explain(error: RequestValidationError, model: type[Request]) -> ApiError:
    """The first complaint in one sentence: field, value, requirement."""
    first = error.errors()[0]
    path = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}")
    if first["type"] == "extra_forbidden":
        field = ".".join(str(p) for p in path if isinstance(p, int) or p in _FIELDS or p == path[-1])
        hint = suggestion(field, sorted(model.model_fields)) if len(path) == 1 else ""
        hint = "; over HTTP it is return_trace" if field == "trace" else hint
        return ApiError(400, f"unknown field {field!r}{hint}", field, "unknown_field")
    if not path and first["type"] == "string_unicode":
        return ApiError(400, "the name of a field is not valid text", code="unknown_field")
    if not path:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    parts = [p for p in path if isinstance(p, int) or p in _FIELDS]  # the others name the types that were tried
    field = ".".join(map(str, parts))
    if first["type"] == "missing":
        return ApiError(400, f"{field} is missing", field)
    name = next((p for p in reversed(parts) if isinstance(p, str)), "")
    requirement = _REQUIREMENTS.get(name) or first["msg"][:1].lower() + first["msg"][1:]
    requirement = requirement.removeprefix("value error, ")
    return ApiError(400, f"{field} is {_SHORT.repr(first['input'])}; {requirement}", field)
