"""The front of the served application: HTTP in, handles of Target deployments out; it holds no model."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from pipelines.openai_api import ServedModel, create_app
from pipelines.openai_types import DecodeRequest, DecodeResult
from rcd_core.decoding.settings import DecodeSettings


class RemoteModel:
    """A Target deployment as the HTTP interface sees it."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle

    async def decode(self, request: DecodeRequest) -> DecodeResult:
        return await self.handle.decode.remote(request)

    async def ready(self) -> None:
        await self.handle.ready.remote()


@serve.ingress()
class Ingress:
    """Answers even while models are loading or restarted. `about` is what /version says."""

    def __init__(
        self, targets: dict[str, DeploymentHandle], defaults: dict[str, DecodeSettings], about: dict[str, Any]
    ) -> None:
        self.about = about
        created = int(about["created"])
        self.models = {
            name: ServedModel(backend=RemoteModel(handle), defaults=defaults[name], created=created)
            for name, handle in targets.items()
        }

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.models, self.about)

    async def version(self) -> dict[str, Any]:
        """What /version answers, for callers with a handle."""
        return self.about
