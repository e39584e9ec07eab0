"""What an application serves, as plain values: the `args` of cluster/serve.yaml, and what the stage deploy makes of a
recipe. graph.py builds the application from it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, ValidationError

from pipelines.recipe.files import explain, problems_error
from pipelines.recipe.model import Recipe
from pipelines.recipe.rules import checkpoint_problems, needs_reference
from pipelines.recipe.types import Count, Positive, Section
from rcd_core.decode_settings import DecodeSettings

REFERENCE, INGRESS = "Reference", "Ingress"  # deployments
_DEPLOYMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
NonNegative = Annotated[float, Field(ge=0)]


class Replicas(Section):
    """Of one deployment, under Serve's names: as many as the ongoing requests ask for, between two numbers.

    target_ongoing_requests: per replica, above which another one is started; None: max_batch of a model, and for the
    reference a few batches. num_cpus, num_gpus, resources (Ray's custom ones): each replica's; with a GPU the model
    lives on it.
    """

    min_replicas: Count = 1
    max_replicas: Count = 1
    target_ongoing_requests: Positive | None = None
    upscale_delay_s: NonNegative = 30
    downscale_delay_s: NonNegative = 600
    num_cpus: NonNegative = 0.5  # decoding uses what it finds; a live application must leave a small machine room
    num_gpus: NonNegative = 0
    resources: dict[str, Positive] = {}


class DescribedModel(Section):
    """reference: whether requests may start from the reference; None: where `decode` does. deployment: its name on the
    dashboard; None: the model's id. max_batch, max_queue, max_length: replicas.EngineLimits."""

    checkpoint: str
    decode: DecodeSettings = DecodeSettings()
    reference: bool | None = None
    deployment: str | None = None
    max_batch: Count = 32
    max_queue: Annotated[int, Field(ge=0)] = 128
    max_length: Count | None = None
    replicas: Replicas = Replicas()

    @property
    def uses_reference(self) -> bool:
        return needs_reference(self.decode) if self.reference is None else self.reference


class DescribedReference(Section):
    """top_k: ids per position that it answers with where a request wants all of them."""

    checkpoint: str
    top_k: Annotated[int, Field(ge=1, le=32767)] = 32
    replicas: Replicas = Replicas()


class Description(Section):
    """models: by the id that requests name."""

    models: Annotated[dict[str, DescribedModel], Field(min_length=1)]
    reference: DescribedReference | None = None

    @property
    def deployments(self) -> list[str]:
        """Their names: of the models in order, then Reference where there is one, and Ingress."""
        own = [model.deployment or model_id for model_id, model in self.models.items()]
        return [*own, *([REFERENCE] if self.reference else []), INGRESS]

    @property
    def replicas(self) -> list[Replicas]:
        """Of the models in order, then of the reference where there is one."""
        return [*(m.replicas for m in self.models.values()), *([self.reference.replicas] if self.reference else [])]

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What each of the replicas asks for that are there from the beginning."""
        return [bundle(replicas) for replicas in self.replicas for _ in range(replicas.min_replicas)]


def bundle(replicas: Replicas) -> dict[str, float]:
    """What one replica asks of the cluster."""
    asked = {"CPU": replicas.num_cpus, "GPU": replicas.num_gpus, **replicas.resources}
    return {name: amount for name, amount in asked.items() if amount}


def describe(recipe: Recipe, checkpoint: Callable[[str], str]) -> Description:
    """The recipe's models as an application. The reference is part of it where default settings ask for it.

    checkpoint: stage -> where its model lies.
    """
    deploy, resources = recipe.deploy, recipe.resources
    start = replace(deploy.decode, residual=recipe.target.residual.feeds_back, start=deploy.start)
    served = {deploy.model_id: ("Target", checkpoint("target"), start)}
    if deploy.baseline:
        plain = replace(deploy.decode, residual=False)
        served[f"{deploy.model_id}-baseline"] = ("Baseline", checkpoint("baseline"), plain)
    served |= {model_id: (model_id, model.checkpoint, model.decode) for model_id, model in deploy.models.items()}
    behind = any(needs_reference(decode) for _, _, decode in served.values())
    # All models of a place together get the GPUs that one training worker had, which fitted at least one.
    place, behind_place = resources.custom_resources("deploy"), resources.custom_resources("deploy-reference")
    beside = behind and place == behind_place
    replicas = Replicas(
        min_replicas=deploy.min_replicas,
        max_replicas=deploy.max_replicas,
        num_gpus=min(1.0, resources.gpus_per_worker / (len(served) + beside)),
        resources=place,
    )
    models = {
        model_id: DescribedModel(
            checkpoint=where,
            decode=decode,
            deployment=name,
            max_batch=deploy.max_batch,
            max_queue=deploy.max_queue,
            max_length=deploy.max_length,
            replicas=replicas.model_copy(update={"target_ongoing_requests": deploy.target_ongoing_requests}),
        )
        for model_id, (name, where, decode) in served.items()
    }
    reference = None
    if behind:
        gpus = replicas.num_gpus if beside else min(1.0, resources.gpus_per_worker)
        own = replicas.model_copy(update={"num_gpus": gpus, "resources": behind_place})
        reference = DescribedReference(checkpoint=checkpoint("reference"), top_k=recipe.signals.top_k, replicas=own)
    return Description(models=models, reference=reference)


def parse_description(raw: Any, label: str = "the application's args") -> Description:
    """A Description from plain values. Raises one UserError that lists every problem."""
    found = _read(raw)
    if isinstance(found, list):
        raise problems_error(label, found)
    return found


def description_problems(raw: Any) -> list[str]:
    """All that is wrong with the plain values, one line each: the key's path, the value, the remedy."""
    found = _read(raw)
    return found if isinstance(found, list) else []


def _read(raw: Any) -> Description | list[str]:
    try:
        # By way of JSON: strict there still takes a list for a tuple and a mapping for a settings class.
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
            why = "its reference is true" if model.reference else "its decode asks for the reference"
            yield f"{key}: {why}, but there is none; give the key `reference`, or start from zero"
    if description.reference:
        described["reference"] = description.reference
        if not any(model.uses_reference for model in description.models.values()):
            yield (
                "reference: no model uses it; give one the decode settings {residual: true, start: reference} or "
                "reference: true, or leave it out"
            )
    for key, one in described.items():
        yield from checkpoint_problems(f"{key}.checkpoint", one.checkpoint)
        few, many = one.replicas.min_replicas, one.replicas.max_replicas
        if many < few:
            yield f"{key}.replicas.max_replicas is {many} but min_replicas is {few}; it must be at least as large"
    taken = {REFERENCE, INGRESS}
    for key, name in zip(described, description.deployments, strict=False):
        if key == "reference":
            break
        if name in taken or not _DEPLOYMENT.fullmatch(name):
            why = "taken" if name in taken else "no name for a deployment (letters, digits and . _ -)"
            yield f"{key}.deployment, by default the id, is {name!r}, which is {why}; give another one"
        taken.add(name)
