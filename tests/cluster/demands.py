"""What a recipe's stages ask of a cluster, known without one: to check a cluster's node types against.

demands(load_recipe("sdar-8b-b32"))["signals"]     # [{"CPU": 8.0, "GPU": 1.0}, ...], one bundle per process
"""

from __future__ import annotations

from collections.abc import Mapping

from pipelines.recipe.model import Recipe
from pipelines.run.stages import stages_of
from pipelines.serving.description import bundle, describe

Bundle = Mapping[str, float]


def demands(recipe: Recipe) -> dict[str, list[Bundle]]:
    """Stage -> what each of its processes asks of the node it runs on, for as many of them as there may be at once.

    The workers of a training come together (PACK: on few nodes, if these have room), all others one by one; a bundle is
    never split. The driver, Ray's controllers and the HTTP ingress ask for nothing: they run on a head without CPUs.
    """
    resources = recipe.resources
    found: dict[str, list[Bundle]] = {}
    for name, stage in stages_of(recipe).items():
        most = {"pipelines.train:run": resources.worker_counts[-1], "pipelines.precompute:run": resources.signal_actors}
        found[name] = [*stage.bundles[:1]] * most.get(stage.function, len(stage.bundles))
    served = describe(recipe, lambda stage: recipe.checkpoint(stage) or f"/{stage}")
    found["deploy"] = [bundle(replicas) for replicas in served.replicas for _ in range(replicas.max_replicas)]
    return {name: bundles for name, bundles in found.items() if bundles}
