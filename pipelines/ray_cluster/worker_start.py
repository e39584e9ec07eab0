"""What Ray runs when it starts a worker process for a job, before anything of the job is imported.

A worker of a training imports 390,000 objects. Python would look through all of them again and again while they are
imported, and once more when the process ends: more than a quarter of the worker's first and last five seconds.
"""

from __future__ import annotations

import atexit
import gc
from typing import Any

from pipelines.ray_cluster import hub_token

_NEW_OBJECTS = 50_000  # before a collection, instead of 700


def runtime_env() -> dict[str, Any]:
    """For ray.init."""
    hook = begin_with_token if hub_token.has() else begin
    return {"worker_process_setup_hook": f"{__name__}.{hook.__name__}"}


def collect_rarely() -> None:
    """For the rest of the process: collect garbage in larger portions, and not what is left at the end."""
    gc.set_threshold(_NEW_OBJECTS, 20, 20)
    atexit.register(gc.freeze)


def begin() -> None:
    collect_rarely()


def begin_with_token() -> None:
    collect_rarely()
    hub_token.take()
