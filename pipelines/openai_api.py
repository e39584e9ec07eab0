"""The OpenAI-compatible HTTP interface, free of Ray and of models: `create_app` over anything that can decode.

GET /v1/models, /v1/models/{id}, /health, /ready, /version; POST /v1/completions, /v1/chat/completions.
Errors have OpenAI's shape: 400 for a bad field, naming it, 404 for an unknown model, 504 after the deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pipelines.openai_types import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DecodeRequest,
    DecodeResult,
    Request,
    response,
)
from pipelines.recipe_file import suggestion
from rcd_core.decoding.settings import DecodeSettings
from rcd_core.errors import UserError

DEADLINE_S = 600.0


class Backend(Protocol):
    """A model that decodes, in this process or another."""

    async def decode(self, request: DecodeRequest) -> DecodeResult:
        """Raises UserError for a request that this model refuses."""

    async def ready(self) -> None:
        """Returns once the model can decode; raises where it cannot."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model by the name that requests give, and its settings where they give none."""

    backend: Backend
    defaults: DecodeSettings
    created: int


def create_app(models: Mapping[str, ServedModel], about: Mapping[str, Any]) -> FastAPI:
    """The application. `about` is what /version answers."""
    app = FastAPI(title="Residual Context Diffusion", docs_url="/docs", redoc_url=None)
    _shape_errors(app)

    def card(model_id: str) -> dict[str, Any]:
        return {"id": model_id, "object": "model", "created": _find(models, model_id).created, "owned_by": "rcd"}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card(model_id) for model_id in models]}

    @app.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> dict[str, Any]:
        return card(model_id)

    @app.post("/v1/completions")
    async def complete(request: CompletionRequest) -> dict[str, Any]:
        return await _answer(models, request)

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest) -> dict[str, Any]:
        return await _answer(models, request)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        try:
            await asyncio.wait_for(asyncio.gather(*(m.backend.ready() for m in models.values())), timeout=5)
        except Exception as error:
            raise ApiError(503, f"not ready: {error!r}") from error
        return {"status": "ready"}

    @app.get("/version")
    async def version() -> dict[str, Any]:
        return dict(about)

    return app


async def _answer(models: Mapping[str, ServedModel], request: CompletionRequest | ChatRequest) -> dict[str, Any]:
    model = _find(models, request.model)
    if request.stream:
        raise ApiError(400, "stream is true; streaming is not offered yet: leave it out", "stream")
    started = time.monotonic()
    try:
        asked = [model.backend.decode(r) for r in request.decode_requests(model.defaults)]
        results = await asyncio.wait_for(asyncio.gather(*asked), DEADLINE_S)
    except UserError as error:
        raise ApiError(400, str(error), _field_of(str(error))) from error
    except TimeoutError as error:
        raise ApiError(504, f"no answer within {DEADLINE_S:g} s; ask for fewer tokens") from error
    return response(request, results, time.monotonic() - started)


def _find(models: Mapping[str, ServedModel], model_id: str) -> ServedModel:
    if model_id not in models:
        message = f"model {model_id!r} does not exist; served here: {', '.join(models)}"
        raise ApiError(404, message, "model", "model_not_found")
    return models[model_id]


def _field_of(message: str) -> str | None:
    """Messages of UserErrors begin with the field they are about."""
    first = message.split(" ", 1)[0]
    return first if first in CompletionRequest.model_fields or first in ChatRequest.model_fields else None


def _shape_errors(app: FastAPI) -> None:
    """Every error that leaves the application is an ApiError's body."""

    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(ApiError)
    async def on_api_error(_: HttpRequest, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def on_bad_body(http: HttpRequest, error: RequestValidationError) -> JSONResponse:
        return answer(_explain(error, ChatRequest if "/chat/" in http.url.path else CompletionRequest))

    @app.exception_handler(HTTPException)
    async def on_http_error(http: HttpRequest, error: HTTPException) -> JSONResponse:
        return answer(ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def on_failure(_: HttpRequest, error: Exception) -> JSONResponse:
        return answer(ApiError(500, f"the server failed: {type(error).__name__}; its log says more"))


def _explain(error: RequestValidationError, model: type[Request]) -> ApiError:
    """The first complaint, in one sentence that names the field, the value and what is wanted."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    field = where[0] if where else None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no valid JSON: {first['ctx']['error']}")
    if first["type"] == "extra_forbidden":
        path = ".".join(where)
        known = sorted(model.model_fields) if len(where) == 1 else []
        return ApiError(400, f"unknown field {path!r}{suggestion(path, known)}", path, "unknown_field")
    if first["type"] == "missing":
        return ApiError(400, f"{field or 'the body'} is missing", field)
    return ApiError(400, f"{field} is {first['input']!r}; {first['msg'][:1].lower()}{first['msg'][1:]}", field)
