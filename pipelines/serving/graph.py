"""The served application: HTTP ingress -> one deployment per model -> reference, built from a Description.

The stage deploy and Ray Serve's own commands build it the same way:

    serve deploy cluster/serve.yaml               # import_path pipelines.serving.graph:build, `args` a Description
    serve build pipelines.serving.graph:app -o f  # the first application in RCD_SERVE_CONFIG or cluster/serve.yaml
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.context import _get_global_client  # the only way to get the address of a running Serve
from ray.serve.handle import DeploymentHandle

from pipelines.run.keys import key_of
from pipelines.serving.api_keys import api_keys, check_host
from pipelines.serving.backend import ServedModel
from pipelines.serving.config_file import app_args
from pipelines.serving.description import (
    INGRESS,
    REFERENCE,
    DescribedModel,
    DescribedReference,
    Description,
    Replicas,
    at_commits,
    parse_description,
)
from pipelines.serving.http.app import create_app
from pipelines.serving.http.guard import ApiLimits
from pipelines.serving.reference import REFERENCE_SESSIONS, REFERENCE_THREADS, Reference
from pipelines.serving.remote_model import RemoteModel
from pipelines.serving.target import MAX_LENGTH, Target
from rcd_core.decode_settings import DecodeSettings

INGRESS_REQUESTS = 4096  # at once; the targets refuse requests beyond their queues
SPARE_REQUESTS = 32  # beyond an engine's batch and queue: refusals in progress, statistics, /ready
DRAIN_SPARE_S = 10.0  # beyond the longest deadline, so that a request that reaches it ends with our own error
ON_HEAD = {"node:__internal_head__": 0.001}  # a resource of the head, in each Ray cluster
REFERENCE_CALLS = 4  # calls per reference replica, above which Serve adds another one
_WHERE = "in the environment of the node that built the application"
# Serve's switches for less work per message: one event loop per replica (the engine has its own thread anyway), and
# buffered request logs.
LEAN = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
}
# The ingress calls its targets from that loop. A target calls its reference from threads, which needs a separate loop.
LEAN_INGRESS = {**LEAN, "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
# A pure function of session and replicas, so that the blocks of a request reach the replica that caches its context.
# Without sessions, or with one replica, Serve's default router is as good.
STICKY = RequestRouterConfig(
    request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"  # type: ignore[arg-type]
)


@serve.ingress()
class Ingress:
    """Answers even while models load or restart. about: the body of /version. Raises UserError if Serve listens beyond
    this machine without keys."""

    def __init__(
        self,
        targets: dict[str, DeploymentHandle],
        defaults: dict[str, DecodeSettings],
        about: dict[str, Any],
        limits: ApiLimits,
        tasks: dict[str, str | None] | None = None,
    ) -> None:
        check_host("http_options.host", http_host(), limits.api_keys, limits.allow_without_keys, _WHERE)
        self.about, self.limits = about, limits
        created = int(about["created"])
        self.models = {
            name: ServedModel(
                backend=RemoteModel(handle), defaults=defaults[name], created=created, task=(tasks or {}).get(name)
            )
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


def application(
    description: Description, limits: ApiLimits, about: Mapping[str, Any] | None = None
) -> serve.Application:
    """The graph of deployments. about: added to the body of /version; its `key` identifies the application."""
    # A replaced replica finishes its requests first, however long they take.
    draining: dict[str, Any] = {"graceful_shutdown_timeout_s": limits.timeout_s + DRAIN_SPARE_S}
    reference, sessions = None, 1
    if described := description.reference:
        users = [model for model in description.models.values() if model.uses_reference]
        calls = REFERENCE_CALLS * REFERENCE_THREADS * sum(model.replicas.max_replicas for model in users)
        router: dict[str, Any] = {}
        if described.replicas.max_replicas > 1:
            sessions, router = REFERENCE_SESSIONS, {"request_router_config": STICKY}
        reference = _deployment(
            Reference,
            REFERENCE,
            described.replicas,
            target_ongoing=REFERENCE_CALLS * sessions,
            max_ongoing=calls * sessions,
            **_ranks(described),
            **router,
            **draining,
        ).bind(
            described.checkpoint,
            described.replicas.num_gpus,
            sum(model.max_batch * model.replicas.max_replicas for model in users),
            max(model.max_length or MAX_LENGTH for model in users),
            described.attention,
            described.bundles,
            described.weights,
            description.process,
        )
    targets = {}
    for model_id, model in description.models.items():
        targets[model_id] = _deployment(
            Target,
            model.deployment or model_id,
            model.replicas,
            target_ongoing=model.max_batch,
            max_ongoing=model.max_batch + model.max_queue + SPARE_REQUESTS,  # the engine itself refuses more
            **_ranks(model),
            **draining,
        ).bind(
            model.checkpoint,
            model.replicas.num_gpus,
            reference if model.uses_reference else None,
            reference_top_k=described.top_k if described else 1,
            reference_sessions=sessions,
            max_batch=model.max_batch,
            max_queue=model.max_queue,
            max_length=model.max_length,
            bundles=model.bundles,
            process=description.process,
            attention=model.attention,
            weights=model.weights,
            has_t_res=model.decode.residual_temperature is not None,
        )
    defaults = {model_id: model.decode for model_id, model in description.models.items()}
    body = {
        "version": _release(),
        "key": key_of(description.model_dump(mode="json")),
        "created": int(time.time()),
        "reference_top_k": described.top_k if described else None,
        "settings": {model_id: asdict(settings) for model_id, settings in defaults.items()},
        **(about or {}),
    }
    settings = description.ingress
    ingress = serve.deployment(
        name=INGRESS,
        num_replicas=settings.replicas or min(2, _num_nodes()),
        max_ongoing_requests=INGRESS_REQUESTS,
        max_surge_percent=100,  # a replica costs almost nothing: start the new one before the old one stops
        ray_actor_options={
            "num_cpus": 0,
            "resources": ON_HEAD if settings.resources is None else settings.resources,
            "runtime_env": {"env_vars": LEAN_INGRESS},
        },
        **(draining if settings.drain_s is None else {"graceful_shutdown_timeout_s": settings.drain_s}),
    )
    tasks = {model_id: model.task for model_id, model in description.models.items()}
    return ingress(Ingress).bind(targets, defaults, body, limits, tasks)


def _ranks(described: DescribedModel | DescribedReference) -> dict[str, Any]:
    """Serve puts the replica into the first bundle, and the other ranks, which it starts, into the others."""
    return {"placement_group_bundles": described.bundles} if described.tensor_parallel > 1 else {}


def build(args: dict[str, Any]) -> serve.Application:
    """Serve's application builder (`import_path: pipelines.serving.graph:build`). API keys come from the environment of
    the process that builds it, on any node. Raises UserError with every problem of `args`."""
    description = at_commits(parse_description(args))
    return application(description, api_limits(description))


def api_limits(description: Description) -> ApiLimits:
    """With the API keys of this process's environment. Raises UserError if they cannot be read."""
    return ApiLimits(
        api_keys=api_keys(),
        open_state=description.open_state,
        allow_without_keys=description.allow_without_keys,
        cors_origins=description.cors_origins,
    )


def http_host() -> str:
    """The host that Serve on this cluster listens on."""
    client: Any = _get_global_client()
    return str(client.http_config.host)


def __getattr__(name: str) -> serve.Application:
    """`app`, built on access: `serve build` takes a finished application, no builder with args."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return build(app_args())


def _deployment(
    replica: type, name: str, replicas: Replicas, *, target_ongoing: float, max_ongoing: int, **options: Any
) -> serve.Deployment:
    scale: dict[str, Any] = {"num_replicas": replicas.min_replicas}
    if replicas.max_replicas > replicas.min_replicas:
        scale = {
            "autoscaling_config": {
                "min_replicas": replicas.min_replicas,
                "max_replicas": replicas.max_replicas,
                "target_ongoing_requests": replicas.target_ongoing_requests or float(target_ongoing),
                "upscale_delay_s": replicas.upscale_delay_s,
                "downscale_delay_s": replicas.downscale_delay_s,
            }
        }
    decorate = serve.deployment(
        name=name,
        max_ongoing_requests=max_ongoing,
        max_constructor_retry_count=2,
        ray_actor_options={
            "num_cpus": replicas.num_cpus,
            "num_gpus": replicas.num_gpus,
            "resources": replicas.resources,
            "runtime_env": {"env_vars": LEAN},
        },
        **scale,
        **options,
    )
    return decorate(replica)


def _num_nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1


def _release() -> str:
    try:
        return version("rcd-ray")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"
