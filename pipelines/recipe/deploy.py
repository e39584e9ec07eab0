"""The section `deploy` of a recipe. The args of a Serve config have some of the same keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipelines.recipe.files import ORIGIN, RUN_NAME
from pipelines.recipe.types import Count, Positive, Section
from rcd_core.decode_settings import DecodeAttention, DecodeSettings, Start, Weights


class DeployedModel(Section):
    """A checkpoint from outside the run, served next to the target."""

    checkpoint: str
    """Directory, URI or hub id."""
    decode: DecodeSettings = DecodeSettings()
    """Default decoding settings of its requests."""


class IngressSettings(Section):
    """The replicas that take HTTP requests and call the models."""

    replicas: Count | None = None
    """Number of them; null: two if the cluster has two nodes when it is deployed, else one."""
    resources: dict[str, Positive] | None = None
    """Custom Ray resources of each; null: a place on the head, where no spot node can take it away; {}: any node."""
    drain_s: Positive | None = None
    """Seconds that a replaced replica has to end its requests; null: ten more than the longest deadline."""


Origin = Annotated[str, Field(pattern=ORIGIN)]


class DeploySettings(Section):
    """The HTTP endpoint."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    allow_without_keys: bool = False
    """Serve beyond this machine without API keys, to everyone who reaches `host`."""
    open_state: bool = False
    """`/health`, `/ready` and `/metrics` need no API key."""
    cors_origins: tuple[Origin, ...] = ()
    """Web pages of these origins (`https://chat.example.org`) may call the API from a browser; `*` lets all."""
    ingress: IngressSettings = IngressSettings()
    """Number, place and drain of the HTTP ingress."""
    model_id: str = "rcd"
    """The name that requests give as `model`."""
    start: Start = "reference"
    """Default `start` of requests; `reference` deploys the reference, too."""
    decode: DecodeSettings = DecodeSettings()
    """Default decoding settings of requests."""
    baseline: bool = False
    """Also serve the baseline, as `<model_id>-baseline`."""
    models: dict[Annotated[str, Field(pattern=RUN_NAME)], DeployedModel] = {}
    """Further models by id."""
    max_batch: Count = 32
    """Requests that a replica decodes at once; fewer when memory is short."""
    max_queue: Annotated[int, Field(ge=0)] = 128
    """Requests that may wait per replica; further ones get status 429."""
    attention: DecodeAttention = "auto"
    """Attention of target and reference, as in `evaluate`."""
    weights: Weights = "full"
    """How target and reference keep their layers' weights, as in `evaluate`."""
    reference_tensor_parallel: Count = 1
    """Workers over which a replica of the reference is split; `resources.tensor_parallel` splits the other models."""
    max_length: Count | None = None
    """Most tokens of prompt and answer; null: the model's limit, at most 4096."""
    min_replicas: Count = 1
    """Fewest replicas of target and reference each."""
    max_replicas: Count = 1
    """Most replicas of target and reference each; their number follows the load."""
    target_ongoing_requests: Positive | None = None
    """Ongoing requests per target replica above which a replica is added; null: `max_batch`."""
