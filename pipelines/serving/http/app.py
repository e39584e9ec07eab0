"""The OpenAI-compatible HTTP interface over any Backend: `create_app`. It needs no Ray cluster and holds no model.

../README.md lists routes, fields and errors. A client that disconnects cancels its request.
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
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from pipelines.serving.api_keys import api_keys
from pipelines.serving.backend import ServedModel
from pipelines.serving.http.answers import (
    Answer,
    ChatCompletion,
    Completion,
    ModelCard,
    ModelList,
    Status,
    model_facts,
)
from pipelines.serving.http.bodies import ChatRequest, CompletionRequest
from pipelines.serving.http.errors import ERRORS, ApiError, ErrorBody, shape_errors
from pipelines.serving.http.guard import REQUEST_ID, ApiLimits, Guard
from pipelines.serving.http.interleave import Interleaved
from pipelines.serving.http.metrics import ApiMetrics
from pipelines.serving.http.playground import add_playground
from pipelines.serving.http.sse import EventStream, frames, while_connected
from rcd_core.errors import UserError

READY_TIMEOUT_S = 5.0
READING_S = 10.0  # beyond its deadline, in which a client can take the rest of a stream
# itemSchema (OpenAPI 3.2) describes each event; data is a chunk as JSON, or [DONE].
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_SSE = {
    "description": "The answer; with stream: true, its chunks",
    "content": {"text/event-stream": {"itemSchema": _EVENT}},
}


def create_app(
    models: Mapping[str, ServedModel],
    about: Mapping[str, Any],
    limits: ApiLimits | None = None,
    *,
    add_request_id: bool = True,
) -> FastAPI:
    """The application. about: the body of /version; its key becomes system_fingerprint. limits None: the default ones,
    with the API keys of the environment. add_request_id False: a proxy in front, such as Ray Serve's, adds
    X-Request-Id. Raises UserError if the keys cannot be read."""
    limits = ApiLimits(api_keys=api_keys()) if limits is None else limits
    metrics = ApiMetrics()
    app = FastAPI(
        title="Residual Context Diffusion",
        version=str(about.get("version", "unknown")),
        docs_url=None,  # these pages load scripts from another host
        redoc_url=None,
    )
    app.add_middleware(Guard, limits=limits, metrics=metrics, add_request_id=add_request_id)
    if limits.cors_origins:  # around the guard: a browser asks first, without the key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=limits.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=(REQUEST_ID, "Retry-After"),
        )
    shape_errors(app)
    app.include_router(_openai_routes(models, about.get("key"), limits, metrics))
    app.include_router(_state_routes(models, about, metrics))
    add_playground(app, models)
    _use_own_schema(app)
    return app


def _openai_routes(
    models: Mapping[str, ServedModel], fingerprint: str | None, limits: ApiLimits, metrics: ApiMetrics
) -> APIRouter:
    # For the schema only: Guard checks the key before the body is read.
    keys = [Security(HTTPBearer(auto_error=False))] if limits.api_keys else []
    router = APIRouter(prefix="/v1", dependencies=keys)
    decoding = {**_errors(*ERRORS), 200: _SSE}

    def card(model_id: str) -> dict[str, Any]:
        model = _find(models, model_id)
        facts = {"id": model_id, "object": "model", "created": model.created, "owned_by": "rcd"}
        return facts | ({"rcd": model_facts(model.task)} if model.task else {})

    @router.get("/models", response_model=ModelList, response_model_exclude_unset=True, responses=_errors(401))
    async def list_models() -> dict[str, Any]:
        """The served models."""
        return {"object": "list", "data": [card(model_id) for model_id in models]}

    @router.get(
        "/models/{model_id:path}",
        response_model=ModelCard,
        response_model_exclude_unset=True,
        responses=_errors(401, 404),
    )
    async def get_model(model_id: str) -> dict[str, Any]:
        """One served model; `rcd` says what it was trained for, with an example."""
        return card(model_id)

    async def decode(request: CompletionRequest | ChatRequest, http: HttpRequest) -> Any:
        served = _find(models, request.model)
        limit_s = _deadline(request, limits)
        request.check_size(limits.max_chars)
        requests = list(request.decode_requests(served.defaults))
        answer = Answer(request, len(requests), fingerprint, served.task)
        async with AsyncExitStack() as closing:
            streams = Interleaved(map(served.backend.stream, requests), limit_s)
            closing.push_async_callback(streams.aclose)
            closing.enter_context(metrics.decoding(request.model, answer))
            if not request.stream:
                return await while_connected(http.receive, _whole(answer, streams))
            # A refusal is the first event, and comes at once: it can still set the status.
            first = await while_connected(http.receive, streams.next(limits.ping_s))
            content = frames(answer, streams, first, metrics.stream_failed, limits.ping_s)
            return EventStream(content, closing.pop_all(), limit_s + READING_S)

    @router.post("/completions", response_model=Completion, response_model_exclude_unset=True, responses=decoding)
    async def complete(request: CompletionRequest, http: HttpRequest) -> Any:
        """Continue prompts, or fill the masks of a text (`infill`)."""
        return await decode(request, http)

    @router.post(
        "/chat/completions", response_model=ChatCompletion, response_model_exclude_unset=True, responses=decoding
    )
    async def chat(request: ChatRequest, http: HttpRequest) -> Any:
        """Answer a conversation."""
        return await decode(request, http)

    return router


def _state_routes(models: Mapping[str, ServedModel], about: Mapping[str, Any], metrics: ApiMetrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health", response_model=Status)
    async def health() -> dict[str, str]:
        """200 while this process runs."""
        return {"status": "ok"}

    @router.get("/ready", response_model=Status, responses=_errors(503))
    async def ready() -> dict[str, str]:
        """200 once every model can decode, else 503."""
        try:
            await asyncio.wait_for(asyncio.gather(*(m.backend.ready() for m in models.values())), READY_TIMEOUT_S)
        except Exception as error:
            raise ApiError(503, f"not ready: {error!r}") from error
        return {"status": "ready"}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        """Metrics in Prometheus' text format."""
        text = await metrics.text({name: m.backend for name, m in models.items()})
        return Response(text, media_type="text/plain; version=0.0.4")

    @router.get("/version")
    async def version() -> dict[str, Any]:
        """Release, key and default settings of the deployed application."""
        return dict(about)

    return router


async def _whole(answer: Answer, streams: Interleaved) -> dict[str, Any]:
    while not answer.complete:
        for index, event in await streams.next(streams.limit_s):
            deque(answer.add(index, event), maxlen=0)  # chunks are not needed
    return answer.body()


def _deadline(request: CompletionRequest | ChatRequest, limits: ApiLimits) -> float:
    if request.timeout_s is None:
        return limits.timeout_s
    if request.timeout_s > limits.timeout_s:
        raise UserError(f"timeout_s is {request.timeout_s:g}; the server allows at most {limits.timeout_s:g}")
    return request.timeout_s


def _find(models: Mapping[str, ServedModel], model_id: str) -> ServedModel:
    if model_id not in models:
        message = f"model {model_id!r} does not exist; this server has {', '.join(models)}"
        raise ApiError(404, message, "model", "model_not_found")
    return models[model_id]


# -- /openapi.json


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": ERRORS[status][0]} for status in statuses}


def _use_own_schema(app: FastAPI) -> None:
    """Remove FastAPI's 422 responses, which this application never sends."""

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
