"""The served application: HTTP ingress -> one deployment per model -> reference, built from a Description.

The stage deploy and Ray Serve's own command line come this way alike:

    serve deploy cluster/serve.yaml          # import_path pipelines.serving.graph:build, `args` a Description
    serve build pipelines.serving.graph:app -o f  # `app`: the first one in RCD_SERVE_CONFIG, or cluster/serve.yaml
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from pipelines.run.keys import key_of
from pipelines.serving.config_file import app_args
from pipelines.serving.description import INGRESS, REFERENCE, DescribedModel, Description, Replicas, parse_description
from pipelines.serving.http.guard import ApiLimits, api_keys
from pipelines.serving.ingress import Ingress
from pipelines.serving.reference import REFERENCE_SESSIONS, REFERENCE_THREADS, Reference
from pipelines.serving.target import MAX_LENGTH, EngineLimits, Target

INGRESS_REQUESTS = 4096  # at once; it is the targets that refuse what is too much
SPARE_REQUESTS = 32  # beyond those an engine takes: refusals on their way, statistics, /ready
DRAIN_SPARE_S = 10.0  # beyond the longest deadline: an answer that comes to it ends with an error of ours
# Serve's own switches for less work per message: one event loop in a replica (the engine has a thread of its own in any
# case), and log lines of requests written many at a time.
LEAN = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
}
# The ingress asks from that loop; a target asks its reference from threads, which needs the router in a loop apart.
LEAN_INGRESS = {**LEAN, "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
REFERENCE_CALLS = 4  # batches of targets, per reference replica, above which another one is started
# Pure function of session and replicas: the blocks of a request come to the replica that has its context. Without
# sessions, or with one replica, Serve's default is as good.
STICKY = RequestRouterConfig(
    request_router_class="ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"  # type: ignore[arg-type]
)


def application(
    description: Description, limits: ApiLimits, about: Mapping[str, Any] | None = None
) -> serve.Application:
    """The graph of deployments. about: what /version says besides; its `key` tells applications apart."""
    # A replica that is replaced first ends what it has begun, however long that may take.
    draining: dict[str, Any] = {"graceful_shutdown_timeout_s": limits.timeout_s + DRAIN_SPARE_S}
    reference, sessions = None, 1
    if behind := description.reference:
        asking = [model for model in description.models.values() if model.uses_reference]
        calls = REFERENCE_CALLS * REFERENCE_THREADS * sum(model.replicas.max_replicas for model in asking)
        sticky: dict[str, Any] = {}
        if behind.replicas.max_replicas > 1:
            sessions, sticky = REFERENCE_SESSIONS, {"request_router_config": STICKY}
        kind = _deployment(
            Reference,
            REFERENCE,
            behind.replicas,
            target_ongoing=REFERENCE_CALLS * sessions,
            max_ongoing=calls * sessions,
            **sticky,
            **draining,
        )
        reference = kind.bind(
            behind.checkpoint,
            _device(behind.replicas),
            sum(model.max_batch * model.replicas.max_replicas for model in asking),
            max(model.max_length or MAX_LENGTH for model in asking),
            _part(behind.replicas),
        )
    targets = {}
    for model_id, model in description.models.items():
        # The engine itself refuses what is too much, so Serve must let it through.
        room = model.max_batch + model.max_queue + SPARE_REQUESTS
        name = model.deployment or model_id
        kind = _deployment(Target, name, model.replicas, target_ongoing=model.max_batch, max_ongoing=room, **draining)
        targets[model_id] = kind.bind(
            model.checkpoint,
            _device(model.replicas),
            reference if model.uses_reference else None,
            behind.top_k if behind else 1,
            sessions,
            _limits(model),
        )
    defaults = {model_id: model.decode for model_id, model in description.models.items()}
    everything = {
        "version": _release(),
        "key": key_of(description.model_dump(mode="json")),
        "created": int(time.time()),
        "reference_top_k": behind.top_k if behind else None,
        "settings": {model_id: asdict(settings) for model_id, settings in defaults.items()},
        **(about or {}),
    }
    front = serve.deployment(
        name=INGRESS,
        max_ongoing_requests=INGRESS_REQUESTS,
        max_surge_percent=100,  # it costs next to nothing: the new one is there before the old one goes
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": LEAN_INGRESS}},
        **draining,
    )
    return front(Ingress).bind(targets, defaults, everything, limits)


def build(args: dict[str, Any]) -> serve.Application:
    """Serve's application builder (`import_path: pipelines.serving.graph:build`). API keys come from the environment
    of the cluster's head (http/guard.py). Raises UserError: every problem of `args`."""
    return application(parse_description(args), ApiLimits(api_keys=api_keys()))


def __getattr__(name: str) -> serve.Application:
    """`app`, made when it is asked for: `serve build` takes a finished application and no builder with its args."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return build(app_args())


def _deployment(
    replica: type, name: str, replicas: Replicas, *, target_ongoing: float, max_ongoing: int, **options: Any
) -> serve.Deployment:
    scaled: dict[str, Any] = {"num_replicas": replicas.min_replicas}
    if replicas.max_replicas > replicas.min_replicas:
        scaled = {
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
        **scaled,
        **options,
    )
    return decorate(replica)


def _device(replicas: Replicas) -> str:
    return "cuda" if replicas.num_gpus else "cpu"


def _part(replicas: Replicas) -> float:
    return min(1.0, replicas.num_gpus) or 1.0


def _limits(model: DescribedModel) -> EngineLimits:
    return EngineLimits(
        max_batch=model.max_batch,
        max_queue=model.max_queue,
        max_length=model.max_length,
        gpu_part=_part(model.replicas),
    )


def _release() -> str:
    try:
        return version("rcd-ray")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
