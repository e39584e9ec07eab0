"""The smallest Ray Serve graph that streams an engine's text over HTTP: no checks, settings, retries or metrics.

Its loss against the bare engine is Serve's share; serving.py measures the real application next to it.
"""

# No `from __future__ import annotations`: `app` is pickled to a replica, where FastAPI could not resolve them.
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.responses import StreamingResponse

from pipelines.serving.backend import DecodeRequest, TextDelta
from pipelines.serving.engine_thread import EngineThread
from pipelines.serving.graph import LEAN, LEAN_INGRESS
from rcd_core import load_model
from rcd_core.text.tokenizer import load_tokenizer

app = FastAPI()


class Target:
    def __init__(self, checkpoint: str, max_batch: int) -> None:
        model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
        length = model.max_positions
        self.engine = EngineThread(model, tokenizer, None, max_batch=max_batch, max_length=length, max_queue=128)

    async def stream(self, request: DecodeRequest) -> AsyncIterator[tuple[str, int]]:
        async for event in self.engine.stream(request):
            if isinstance(event, TextDelta):
                yield event.text, len(event.token_ids)


@serve.ingress(app)
class Ingress:
    def __init__(self, target: DeploymentHandle, requests: dict[int, DecodeRequest]) -> None:
        self.handle, self.requests = target.options(stream=True, _by_reference=False), requests

    @app.post("/")
    async def answer(self, http: Request) -> StreamingResponse:
        asked = await http.json()
        like = self.requests[asked["tokens"]]
        settings = replace(like.settings, seed=asked["seed"])
        pieces = self.pieces(replace(like, prompt=asked["prompt"], settings=settings))
        return StreamingResponse(pieces, media_type="text/event-stream")

    async def pieces(self, request: DecodeRequest) -> AsyncIterator[bytes]:
        async for text, count in self.handle.stream.remote(request):
            yield b"data: " + json.dumps([text, count]).encode() + b"\n\n"


def application(checkpoint: str, max_batch: int, requests: dict[int, DecodeRequest]) -> serve.Application:
    """requests: request by answer length in tokens; prompt and seed come by HTTP."""
    options: dict[str, Any] = {"max_ongoing_requests": 1000}
    actor, front = ({"num_cpus": 0, "runtime_env": {"env_vars": env}} for env in (LEAN, LEAN_INGRESS))
    target = serve.deployment(ray_actor_options=actor, **options)(Target).bind(checkpoint, max_batch)
    return serve.deployment(ray_actor_options=front, **options)(Ingress).bind(target, requests)
