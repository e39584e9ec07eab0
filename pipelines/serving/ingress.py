"""The front of the served application: HTTP in, handles of Target deployments out; it holds no model."""

from __future__ import annotations

import hashlib
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from pipelines.serving.backend import ServedModel
from pipelines.serving.http.app import create_app
from pipelines.serving.http.guard import ApiLimits
from pipelines.serving.remote_model import RemoteModel
from rcd_core.decode_settings import DecodeSettings


def limits_id(limits: ApiLimits) -> str:
    """Tells limits apart without telling the keys."""
    known = (limits.timeout_s, limits.max_body_bytes, *sorted(limits.api_keys))
    return hashlib.sha256(repr(known).encode()).hexdigest()


@serve.ingress()
class Ingress:
    """Answers even while models are loading or restarted. `about` is what /version says."""

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
        # Serve's proxy gives every answer its X-Request-Id.
        return create_app(self.models, self.about, self.limits, name_requests=False)

    async def version(self) -> dict[str, Any]:
        """What /version answers, for callers with a handle."""
        return self.about

    async def guard(self) -> str:
        """limits_id of the limits in force, for callers with a handle."""
        return limits_id(self.limits)
