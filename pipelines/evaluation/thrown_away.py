"""What the baseline throws away, measured once per evaluation for its report: as `rcd predict`, on the first problems.

One Ray task with the resources of an evaluation's actor. The result is kept in thrown_away.json, so that a resumed
evaluation does not measure again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ray

from pipelines.evaluation.actor import Method, Plan, read_examples
from pipelines.ray_cluster.hardware import device_of
from pipelines.run.directory import StageContext
from pipelines.run.progress import StillWorking
from rcd_core.calibration.measured import THRESHOLD
from rcd_core.io import storage
from rcd_core.io.retries import be_patient
from rcd_core.tasks import get_task

NUM_PROMPTS = 64


def thrown_away(ctx: StageContext, plan: Plan, suffix: str) -> dict[str, Any] | None:
    """The measures of rcd_core/calibration/information.py and `prompts`; None without a baseline, and where a model is
    split over several processes, which share no observer. suffix: of the files of a further task."""
    baseline = next((method for method in plan.methods if method.info.model == "baseline"), None)
    if baseline is None or len(plan.bundles) > 1:
        return None
    path = storage.join(ctx.directory, f"thrown_away{suffix}.json")
    if not storage.exists(path):
        resources = ctx.recipe.resources
        task = ray.remote(
            num_cpus=resources.cpus_per_worker,
            num_gpus=resources.gpus_per_worker,
            resources=resources.custom_resources("evaluate"),
        )(_measure)
        with StillWorking(ctx.console, f"{ctx.stage}: measuring what {baseline.info.title} throws away"):
            storage.write_json(path, ray.get(task.options(name="thrown away").remote(plan, baseline)))
    found: dict[str, Any] = storage.read_json(path)
    return found


def _measure(plan: Plan, method: Method) -> dict[str, Any]:
    from rcd_core.calibration.information import measure
    from rcd_core.families.loading import load_model

    be_patient()
    plan.process.apply()
    device, dtype = device_of(plan.gpus, plan.threads)
    model = load_model(method.checkpoint, device=device, dtype=dtype, attention=plan.attention, weights=plan.weights)
    prompts: list[list[int]] = []
    for file in plan.files:
        if len(prompts) < NUM_PROMPTS:
            prompts += read_examples(file, ["prompt_ids"])["prompt_ids"].to_pylist()
    settings = replace(method.settings, confidence_threshold=THRESHOLD)
    found = measure(model, prompts[:NUM_PROMPTS], settings, get_task(plan.task).infill)
    return {"prompts": len(prompts[:NUM_PROMPTS]), **found}
