"""The OpenAI-compatible HTTP interface, free of Ray and of models: `create_app` over anything that can decode.

GET /v1/models, /v1/models/{id}, /health, /ready, /metrics, /version, /openapi.json and the page at /; POST
/v1/completions, /v1/chat/completions, whole or as server-sent events. Errors have OpenAI's shape: 400 for a bad field,
naming it, 404 for an unknown model, 429 where the queue is full, 504 after the deadline. A client that hangs up cancels
what it asked for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, FastAPI, Security
from fastapi import Request as HttpRequest
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPBearer
from starlette.responses import PlainTextResponse, Response

from pipelines.serving.backend import ServedModel
from pipelines.serving.http.answers import Answer, ChatCompletion, Completion, ModelCard, ModelList, Status
from pipelines.serving.http.bodies import ChatRequest, CompletionRequest
from pipelines.serving.http.errors import ApiError, ErrorBody, shape_errors
from pipelines.serving.http.guard import ApiLimits, Guard, api_keys
from pipelines.serving.http.interleave import Interleaved
from pipelines.serving.http.metrics import ApiMetrics
from pipelines.serving.http.playground import add_playground
from pipelines.serving.http.sse import EventStream, frames, while_connected
from rcd_core.errors import UserError

READY_TIMEOUT_S = 5.0
# itemSchema: of each event, as OpenAPI 3.2 has it; data is a chunk in JSON, or [DONE].
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_SSE = {
    "description": "The body, or with stream: true its chunks",
    "content": {"text/event-stream": {"itemSchema": _EVENT}},
}
_REASONS = {
    400: "A field is wrong, or one that is not offered; the error names it",
    401: "No valid API key",
    404: "No such model",
    413: "The body is too large",
    429: "The queue is full; Retry-After says when to come again",
    500: "The server failed",
    503: "The model is not available",
    504: "The deadline is over",
}


def create_app(
    models: Mapping[str, ServedModel],
    about: Mapping[str, Any],
    limits: ApiLimits | None = None,
    *,
    name_requests: bool = True,
) -> FastAPI:
    """The application. about: what /version answers; its key is the fingerprint of answers. limits None: the usual
    ones, with the API keys of the environment. name_requests: answer with an X-Request-Id; False behind a proxy that
    does so, as Ray Serve's. Raises UserError where the keys cannot be had."""
    limits = ApiLimits(api_keys=api_keys()) if limits is None else limits
    metrics = ApiMetrics()
    # FastAPI's pages about the API load their scripts from elsewhere; /openapi.json says the same.
    app = FastAPI(
        title="Residual Context Diffusion",
        version=str(about.get("version", "unknown")),
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Guard, limits=limits, metrics=metrics, name_requests=name_requests)
    shape_errors(app)
    app.include_router(_openai_routes(models, about.get("key"), limits, metrics))
    app.include_router(_state_routes(models, about, metrics))
    add_playground(app, models)
    _describe(app)
    return app


def _openai_routes(
    models: Mapping[str, ServedModel], fingerprint: str | None, limits: ApiLimits, metrics: ApiMetrics
) -> APIRouter:
    # The key is asked for before the body is read, by Guard; here it is only told.
    keys = [Security(HTTPBearer(auto_error=False))] if limits.api_keys else []
    router = APIRouter(prefix="/v1", dependencies=keys)
    decoding = {**_errors(*_REASONS), 200: _SSE}

    def card(model_id: str) -> dict[str, Any]:
        return {"id": model_id, "object": "model", "created": _find(models, model_id).created, "owned_by": "rcd"}

    @router.get("/models", response_model=ModelList, responses=_errors(401))
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [card(model_id) for model_id in models]}

    @router.get("/models/{model_id:path}", response_model=ModelCard, responses=_errors(401, 404))
    async def get_model(model_id: str) -> dict[str, Any]:
        return card(model_id)

    async def decode(request: CompletionRequest | ChatRequest, http: HttpRequest) -> Any:
        served = _find(models, request.model)
        limit_s = _limit(request, limits)
        asked = list(request.decode_requests(served.defaults))
        answer = Answer(request, len(asked), fingerprint)
        async with AsyncExitStack() as closing:
            streams = Interleaved(map(served.backend.stream, asked), limit_s)
            closing.push_async_callback(streams.aclose)
            closing.enter_context(metrics.decoding(request.model, answer))
            if not request.stream:
                return await while_connected(http.receive, _whole(answer, streams))
            # A refusal comes first and at once, while it can still have a status of its own.
            first = await while_connected(http.receive, streams.next(limits.ping_s))
            content = frames(answer, streams, first, metrics.stream_failed, limits.ping_s)
            return EventStream(content, closing.pop_all())

    @router.post("/completions", response_model=Completion, response_model_exclude_unset=True, responses=decoding)
    async def complete(request: CompletionRequest, http: HttpRequest) -> Any:
        return await decode(request, http)

    @router.post(
        "/chat/completions", response_model=ChatCompletion, response_model_exclude_unset=True, responses=decoding
    )
    async def chat(request: ChatRequest, http: HttpRequest) -> Any:
        return await decode(request, http)

    return router


def _state_routes(models: Mapping[str, ServedModel], about: Mapping[str, Any], metrics: ApiMetrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health", response_model=Status)
    async def health() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "ok"}

    @router.get("/ready", response_model=Status, responses=_errors(503))
    async def ready() -> dict[str, str]:
        """Whether every model can decode."""
        try:
            await asyncio.wait_for(asyncio.gather(*(m.backend.ready() for m in models.values())), READY_TIMEOUT_S)
        except Exception as error:
            raise ApiError(503, f"not ready: {error!r}") from error
        return {"status": "ready"}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def tell_metrics() -> Response:
        """In the text form of Prometheus."""
        text = await metrics.text({name: m.backend for name, m in models.items()})
        return Response(text, media_type="text/plain; version=0.0.4")

    @router.get("/version")
    async def version() -> dict[str, Any]:
        return dict(about)

    return router


async def _whole(answer: Answer, streams: Interleaved) -> dict[str, Any]:
    while not answer.complete:
        for index, event in await streams.next(streams.limit_s):
            deque(answer.add(index, event), maxlen=0)  # the chunks are for streams
    return answer.body()


def _limit(request: CompletionRequest | ChatRequest, limits: ApiLimits) -> float:
    if request.timeout_s is None:
        return limits.timeout_s
    if request.timeout_s > limits.timeout_s:
        raise UserError(f"timeout_s is {request.timeout_s:g}; the server allows at most {limits.timeout_s:g}")
    return request.timeout_s


def _find(models: Mapping[str, ServedModel], model_id: str) -> ServedModel:
    if model_id not in models:
        message = f"model {model_id!r} does not exist; served here: {', '.join(models)}"
        raise ApiError(404, message, "model", "model_not_found")
    return models[model_id]


# -- /openapi.json


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": _REASONS[status]} for status in statuses}


def _describe(app: FastAPI) -> None:
    """FastAPI would tell of a 422 in a shape of its own, which never leaves this application."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
