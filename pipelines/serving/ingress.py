"""The HTTP front of the served application. It holds handles of Target deployments, but no model."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from pipelines.serving.backend import ServedModel
from pipelines.serving.http.app import create_app
from pipelines.serving.http.guard import ApiLimits
from pipelines.serving.remote_model import RemoteModel
from rcd_core.decode_settings import DecodeSettings


@serve.ingress()
class Ingress:
    """Answers even while models load or restart. about: the body of /version."""

    def __init__(
        self,
        targets: dict[str, DeploymentHandle],
        defaults: dict[str, DecodeSettings],
        about: dict[str, Any],
        limits: ApiLimits,
    ) -> None:
        self.about, self.limits = about, limits
        created = int(about["created"])
        self.models = {
            name: ServedModel(backend=RemoteModel(handle), defaults=defaults[name], created=created)
            for name, handle in targets.items()
        }

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Serve's proxy adds X-Request-Id itself.
        return create_app(self.models, self.about, self.limits, add_request_id=False)

    async def version(self) -> dict[str, Any]:
        """The body of /version, for callers with a handle."""
        return self.about

    async def limits_id(self) -> str:
        """ApiLimits.id of the limits in force, for callers with a handle."""
        return self.limits.id
