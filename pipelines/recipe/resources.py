"""The section `resources` of a recipe."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Annotated

from pydantic import Field

from pipelines.recipe.types import Count, Positive, Section, Workers


class Resources(Section):
    """What stages request from the cluster. Results do not depend on it."""

    num_workers: Workers = 1
    """Training workers; `[2, 8]` trains with as many as fit, also after a restart."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs per worker or actor."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    """GPUs per worker or actor."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Lost workers after which a training resumes; exceptions are never retried."""
    signal_actors: Count = 1
    """Most actors of stage signals."""
    evaluate_actors: Count = 1
    """Most actors of stages calibrate and evaluate."""
    tensor_parallel: Count = 1
    """Workers over which stages evaluate and deploy split each model; an actor or replica takes so many."""
    timeout_s: Annotated[float, Field(ge=0)] = 600
    """Seconds to wait for resources."""
    no_progress_timeout_s: Positive | None = None
    """Fail stage signals when no shard finishes for this many seconds; null waits and reports."""
    custom: dict[str, dict[str, Positive]] = {}
    """Stage or pattern -> custom Ray resources of its workers, to place stages on nodes that offer them."""

    @property
    def worker_counts(self) -> range:
        """Every number of workers that a training may have."""
        workers = self.num_workers
        return range(workers, workers + 1) if isinstance(workers, int) else range(workers[0], workers[1] + 1)

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change."""
        return not isinstance(self.num_workers, int)

    def custom_resources(self, stage: str) -> dict[str, float]:
        """Custom Ray resources of each worker of a stage, from all patterns that match its name."""
        matching = (amounts for pattern, amounts in self.custom.items() if fnmatch(stage, pattern))
        return {name: amount for amounts in matching for name, amount in amounts.items()}

    def worker_bundle(self, stage: str) -> dict[str, float]:
        """All resources that one worker of a stage needs on its node."""
        bundle = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker, **self.custom_resources(stage)}
        return {name: amount for name, amount in bundle.items() if amount}
