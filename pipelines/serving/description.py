"""What an application serves, as plain values: the `args` of cluster/serve.yaml, which the stage deploy derives from a
recipe. graph.py builds the application from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from pipelines.recipe.deploy import IngressSettings, Origin
from pipelines.recipe.files import explain, problems_error
from pipelines.recipe.model import Recipe
from pipelines.recipe.rules import needs_reference
from pipelines.recipe.sources import checkpoint_problems
from pipelines.recipe.types import Count, Positive, Section
from pipelines.run.commits import ask_commit, at_commit, hub_names
from rcd_core.decode_settings import DecodeAttention, DecodeSettings, Weights
from rcd_core.process import ProcessSettings
from rcd_core.tasks import TASKS

REFERENCE, INGRESS = "Reference", "Ingress"  # deployments
_DEPLOYMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
NonNegative = Annotated[float, Field(ge=0)]


class Replicas(Section):
    """Replicas of one deployment, in Serve's terms.

    target_ongoing_requests: Serve adds a replica above this number per replica; None: max_batch of a model, a few
    batches for the reference. num_cpus, num_gpus, resources (Ray's custom ones): of each replica. With num_gpus > 0 the
    model runs on the GPU.
    """

    min_replicas: Count = 1
    max_replicas: Count = 1
    target_ongoing_requests: Positive | None = None
    upscale_delay_s: NonNegative = 30
    downscale_delay_s: NonNegative = 600
    num_cpus: NonNegative = 0.5  # a reservation, no limit; small, so that the application fits next to other work
    num_gpus: NonNegative = 0
    resources: dict[str, Positive] = {}


def _known_task(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"it must be one of {', '.join(TASKS)}")
    return name


class DescribedModel(Section):
    """reference: whether requests may start from the reference; None: if `decode` does. task: what it was trained for,
    for GET /v1/models and the field `valid` of answers; None: not said. deployment: its name on the dashboard; None:
    the model's id. max_batch, max_queue, max_length, attention, weights: as in target.Target.
    tensor_parallel: processes over which a replica splits the model; `replicas` has the resources of each."""

    checkpoint: str
    decode: DecodeSettings = DecodeSettings()
    reference: bool | None = None
    task: Annotated[str, AfterValidator(_known_task)] | None = None
    deployment: str | None = None
    max_batch: Count = 32
    max_queue: Annotated[int, Field(ge=0)] = 128
    max_length: Count | None = None
    tensor_parallel: Count = 1
    attention: DecodeAttention = "auto"
    weights: Weights = "full"
    replicas: Replicas = Replicas()

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Resources of the ranks of a replica."""
        return [bundle(self.replicas)] * self.tensor_parallel

    @property
    def uses_reference(self) -> bool:
        return needs_reference(self.decode) if self.reference is None else self.reference


class DescribedReference(Section):
    """top_k: ids per position in its answers to requests that want the whole distribution. tensor_parallel: as in
    DescribedModel."""

    checkpoint: str
    top_k: Annotated[int, Field(ge=1, le=32767)] = 32
    attention: DecodeAttention = "auto"
    weights: Weights = "full"
    tensor_parallel: Count = 1
    replicas: Replicas = Replicas()

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Resources of the ranks of a replica."""
        return [bundle(self.replicas)] * self.tensor_parallel


class Description(Section):
    """models: by the id in the field `model` of requests. allow_without_keys, open_state, cors_origins, ingress: as
    `deploy.*` of a recipe. deterministic, verify_weights: as the recipe's."""

    models: Annotated[dict[str, DescribedModel], Field(min_length=1)]
    reference: DescribedReference | None = None
    allow_without_keys: bool = False
    open_state: bool = False
    cors_origins: tuple[Origin, ...] = ()
    ingress: IngressSettings = IngressSettings()
    deterministic: bool = False
    verify_weights: bool = True

    @property
    def process(self) -> ProcessSettings:
        """Of every replica."""
        return ProcessSettings(verify_weights=self.verify_weights, deterministic=self.deterministic)

    @property
    def deployments(self) -> list[str]:
        """Names: of the models in order, then Reference if there is one, then Ingress."""
        models = [model.deployment or model_id for model_id, model in self.models.items()]
        return [*models, *([REFERENCE] if self.reference else []), INGRESS]

    @property
    def replicas(self) -> list[Replicas]:
        """Of the models in order, then of the reference if there is one."""
        return [*(m.replicas for m in self.models.values()), *([self.reference.replicas] if self.reference else [])]

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Resources of the replicas that are started at first."""
        models = [b for model in self.models.values() for b in model.bundles * model.replicas.min_replicas]
        reference = self.reference
        return models + (reference.bundles * reference.replicas.min_replicas if reference else [])


def bundle(replicas: Replicas) -> dict[str, float]:
    """Resources of one replica, in Ray's terms."""
    resources = {"CPU": replicas.num_cpus, "GPU": replicas.num_gpus, **replicas.resources}
    return {name: amount for name, amount in resources.items() if amount}


def describe(recipe: Recipe, checkpoint: Callable[[str], str], t_res: float | None = None) -> Description:
    """The application of a recipe. It has a reference if the default settings of a model start from it.

    checkpoint: stage -> path of its model. t_res: default residual_temperature of the target; None: the checkpoint's.
    """
    deploy, resources = recipe.deploy, recipe.resources
    start = replace(deploy.decode, residual=recipe.target.residual.feeds_back, start=deploy.start)
    if start.residual_temperature is None:
        start = replace(start, residual_temperature=t_res)
    served = {deploy.model_id: ("Target", checkpoint("target"), start)}
    if deploy.baseline:
        plain = replace(deploy.decode, residual=False)
        served[f"{deploy.model_id}-baseline"] = ("Baseline", checkpoint("baseline"), plain)
    tasks = dict.fromkeys(("Target", "Baseline"), recipe.data.test_task or recipe.data.task)
    served |= {model_id: (model_id, model.checkpoint, model.decode) for model_id, model in deploy.models.items()}
    has_reference = any(needs_reference(decode) for _, _, decode in served.values())
    # Models on the same nodes share the GPUs of one training worker, which held at least one of them.
    nodes, reference_nodes = resources.custom_resources("deploy"), resources.custom_resources("deploy-reference")
    shares_gpus = has_reference and nodes == reference_nodes
    ranks = resources.tensor_parallel  # each on a GPU of its own
    replicas = Replicas(
        min_replicas=deploy.min_replicas,
        max_replicas=deploy.max_replicas,
        num_gpus=min(1.0, resources.gpus_per_worker / ((len(served) + shares_gpus) if ranks == 1 else 1)),
        resources=nodes,
    )
    limits: dict[str, Any] = deploy.model_dump(include={"max_batch", "max_queue", "max_length", "attention", "weights"})
    limits["tensor_parallel"] = ranks
    limits["replicas"] = replicas.model_copy(update={"target_ongoing_requests": deploy.target_ongoing_requests})
    models = {
        model_id: DescribedModel(checkpoint=path, decode=decode, deployment=name, task=tasks.get(name), **limits)
        for model_id, (name, path, decode) in served.items()
    }
    reference = None
    if has_reference:
        own = not shares_gpus or deploy.reference_tensor_parallel > 1
        gpus = min(1.0, resources.gpus_per_worker) if own else replicas.num_gpus
        replicas = replicas.model_copy(update={"num_gpus": gpus, "resources": reference_nodes})
        path, top_k = checkpoint("reference"), recipe.signals.top_k
        reference = DescribedReference(
            checkpoint=path,
            top_k=top_k,
            attention=deploy.attention,
            weights=deploy.weights,
            tensor_parallel=deploy.reference_tensor_parallel,
            replicas=replicas,
        )
    doors = {name: getattr(deploy, name) for name in ("allow_without_keys", "open_state", "cors_origins", "ingress")}
    process = {name: getattr(recipe, name) for name in ("deterministic", "verify_weights")}
    return Description(models=models, reference=reference, **doors, **process)


def at_commits(description: Description) -> Description:
    """The description with every hub id at the commit that it names now, so that all replicas load the same weights.

    Raises UserError if the hub does not say it and the id was never downloaded here.
    """
    raw = description.model_dump(mode="json")
    described = [one for one in (*raw["models"].values(), raw["reference"]) if one]
    commits = {name: ask_commit(name) for name in hub_names(one["checkpoint"] for one in described)}
    for one in described:
        one["checkpoint"] = at_commit(one["checkpoint"], commits)
    return parse_description(raw)


def parse_description(raw: Any, label: str = "the application's args") -> Description:
    """A Description from plain values. Raises one UserError that lists every problem."""
    parsed = _parse(raw)
    if isinstance(parsed, list):
        raise problems_error(label, parsed)
    return parsed


def description_problems(raw: Any) -> list[str]:
    """The problems of plain values, one line each: the key's path, the value, the remedy."""
    parsed = _parse(raw)
    return parsed if isinstance(parsed, list) else []


def _parse(raw: Any) -> Description | list[str]:
    try:
        # From JSON, where strict mode accepts a list for a tuple and a mapping for a settings class.
        description = Description.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        return explain(error, Description)
    return list(_contradictions(description)) or description


def _contradictions(description: Description) -> Iterator[str]:
    described: dict[str, DescribedModel | DescribedReference] = {
        f"models.{model_id}": model for model_id, model in description.models.items()
    }
    for key, model in described.items():
        if isinstance(model, DescribedModel) and model.uses_reference and description.reference is None:
            reason = "its reference is true" if model.reference else "its decode starts from the reference"
            yield f"{key}: {reason}, but the application has none; add the key `reference`, or start from zero"
    if description.reference:
        described["reference"] = description.reference
        if not any(model.uses_reference for model in description.models.values()):
            yield (
                "reference: no model uses it; give one the decode settings {residual: true, start: reference} or "
                "reference: true, or remove it"
            )
    for key, one in described.items():
        yield from checkpoint_problems(f"{key}.checkpoint", one.checkpoint)
        if one.tensor_parallel > 1 and one.weights != "full":
            yield f"{key}.weights is {one.weights!r} but tensor_parallel {one.tensor_parallel}; set one to its default"
        few, many = one.replicas.min_replicas, one.replicas.max_replicas
        if one.tensor_parallel > 1 and one.replicas.num_gpus % 1:
            yield (
                f"{key}.replicas.num_gpus is {one.replicas.num_gpus:g} and tensor_parallel {one.tensor_parallel}; each "
                "rank needs a GPU of its own, so set num_gpus to 1, or to 0 for CPUs"
            )
        if many < few:
            yield f"{key}.replicas.max_replicas is {many} but min_replicas is {few}; it must be at least as large"
    taken = {REFERENCE, INGRESS}
    for key, name in zip(described, description.deployments, strict=False):
        if key == "reference":
            break
        if name in taken or not _DEPLOYMENT.fullmatch(name):
            reason = "taken" if name in taken else "not a deployment name (letters, digits and . _ -)"
            yield f"{key}.deployment, by default the id, is {name!r}, which is {reason}; choose another"
        taken.add(name)
