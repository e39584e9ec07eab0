"""Rules of a recipe about workers, GPUs, kernels and placement; rules.py has the others."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch

from pipelines.recipe.model import Recipe
from rcd_core.training.settings import TrainSettings


def worker_problems(recipe: Recipe) -> Iterator[str]:
    """Yield one message per contradiction: key, value, remedy."""
    yield from _attention_problems(recipe)
    yield from _deterministic_problems(recipe)
    yield from _count_problems(recipe)
    yield from _placement_problems(recipe)


def trainings(recipe: Recipe) -> dict[str, TrainSettings]:
    """Recipe key -> settings of every training."""
    settings = {
        "base.train": recipe.base.train if recipe.base else None,
        "reference.train": recipe.reference.train if recipe.reference else None,
        "target.train": recipe.target.train,
    }
    settings |= {f"baselines.{name}": train for name, train in recipe.baselines.items()}
    return {key: train for key, train in settings.items() if train}


def _placement_problems(recipe: Recipe) -> Iterator[str]:
    """resources.custom: its patterns must match stages, its resources must be custom ones."""
    stages = ["base", "reference", "signals", "target", *(f"target-{name}" for name in recipe.variants)]
    for number in range(1, recipe.target.rounds):
        stages += [f"round-{number}", f"signals-{number + 1}"]
    stages += ["baseline", *(f"baseline-{name}" for name in recipe.baselines)]
    stages += ["calibrate", "evaluate", "deploy", "deploy-reference"]
    for pattern, amounts in recipe.resources.custom.items():
        if not any(fnmatch(stage, pattern) for stage in stages):
            yield f"resources.custom.{pattern} matches no stage with workers; those are {', '.join(stages)}"
        for name in {"CPU", "GPU", "memory", "object_store_memory"} & set(amounts):
            yield f"resources.custom.{pattern}.{name} is no custom resource; use keys like resources.cpus_per_worker"


def _count_problems(recipe: Recipe) -> Iterator[str]:
    """The trainings against the number of workers and the held-out examples."""
    resources = recipe.resources
    counts, workers = resources.worker_counts, resources.num_workers
    if resources.tensor_parallel > 1 and resources.gpus_per_worker % 1:
        yield (
            f"resources.tensor_parallel is {resources.tensor_parallel} and resources.gpus_per_worker "
            f"{resources.gpus_per_worker:g}; each of these workers needs a GPU of its own, so set it to 1"
        )
    if resources.elastic and not counts:
        yield f"resources.num_workers is {list(workers)}; give the smaller number first, as in [2, 8]"  # type: ignore[arg-type]
    if resources.elastic and not resources.max_failures:
        yield "resources.max_failures is 0 but resources.num_workers is a range, which needs restarts; raise it"
    for key, train in trainings(recipe).items():
        unfit = [str(count) for count in counts if train.batch_size % count]
        if unfit:
            count = f"{list(workers)}, which can be {', '.join(unfit)}" if isinstance(workers, tuple) else workers
            yield f"{key}.batch_size is {train.batch_size}, no multiple of resources.num_workers {count}; change one"
        if train.shard_size and (uneven := [n for n in counts if n > train.shard_size and n % train.shard_size]):
            yield (
                f"{key}.shard_size is {train.shard_size}, which does not divide resources.num_workers {uneven[0]}; "
                "change one"
            )
        if resources.elastic and train.strategy == "deepspeed":
            yield (
                f"{key}.strategy is deepspeed, whose checkpoints fit one number of workers only; set "
                "resources.num_workers to one number, or use fsdp2"
            )
        if train.deepspeed and train.strategy != "deepspeed":
            yield f"{key}.deepspeed is given but {key}.strategy is {train.strategy}; set it to deepspeed"
        if train.validate_every and not recipe.data.num_validation:
            yield (f"{key}.validate_every is {train.validate_every} but data.num_validation is 0; hold out examples")


def _attention_problems(recipe: Recipe) -> Iterator[str]:
    gpus = recipe.resources.gpus_per_worker
    chosen: list[tuple[str, str]] = [("evaluate", recipe.evaluate.attention), ("deploy", recipe.deploy.attention)]
    chosen += [(key, train.attention) for key, train in trainings(recipe).items()]
    for key, name in chosen:
        if name in ("flex", "flash", "varlen") and not gpus:
            yield f"{key}.attention is {name!r}, which needs a GPU, but resources.gpus_per_worker is 0; use 'sdpa'"


def _deterministic_problems(recipe: Recipe) -> Iterator[str]:
    """Settings under which nothing is known about the bits of a training."""
    for key, train in trainings(recipe).items() if recipe.deterministic else ():
        for name, value in (("compile", True), ("attention", "flex"), ("strategy", "deepspeed")):
            if getattr(train, name) == value:
                yield f"deterministic is true but {key}.{name} is {value!r}, which may choose other kernels; change one"
