"""Which jobs and applications hold resources of the cluster, for a user whose job waits for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Bundle = Mapping[str, float]
Holding = tuple[str, tuple[tuple[str, float], ...]]  # holder, resources of one of its processes
_REPLICA = "SERVE_REPLICA::"  # Serve names its actors SERVE_REPLICA::application#deployment#id


def holders(names: Iterable[str]) -> list[str]:
    """Jobs (by the id for `ray job stop`) and served applications that hold some of the named resources.

    One line each, like "job raysubmit_1 (2 x CPU 1)". Reservations of idle placement groups count; tasks do not, as Ray
    keeps no table of them. Empty when this release of Ray has other internal tables.
    """
    try:
        counts = Counter(_holdings(set(names)))
    except (ImportError, AttributeError, TypeError):  # internal tables: without them the message is only shorter
        return []
    by_holder: dict[str, list[str]] = {}
    for (who, what), count in sorted(counts.items()):
        by_holder.setdefault(who, []).append(f"{count} x " + ", ".join(f"{name} {amount:g}" for name, amount in what))
    return [f"{who} ({'; '.join(parts)})" for who, parts in by_holder.items()]


def _holdings(names: set[str]) -> Iterator[Holding]:
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    schema: Any = gcs_pb2  # its classes are created at import
    tables = state._connect_and_get_accessor()
    listed = tables.get_job_table(skip_submission_job_info_field=True, skip_is_running_tasks_field=True)
    jobs = {job.job_id: _job(job) for job in map(schema.JobTableData.FromString, listed)}
    for group in map(schema.PlacementGroupTableData.FromString, tables.get_placement_group_table()):
        if group.state == schema.PlacementGroupTableData.CREATED:
            for bundle in group.bundles:
                yield from _filtered(
                    jobs.get(group.creator_job_id, "a job that has ended"), bundle.unit_resources, names
                )
    for actor in map(schema.ActorTableData.FromString, tables.get_actor_table(None, "ALIVE")):
        if not actor.placement_group_id:  # others are in the bundles of their group
            served = actor.name.removeprefix(_REPLICA).partition("#")[0] if actor.name.startswith(_REPLICA) else ""
            who = f"the served application {served}" if served else jobs.get(actor.job_id, "a job that has ended")
            yield from _filtered(who, actor.required_resources, names)


def _filtered(who: str, resources: Bundle, names: set[str]) -> Iterator[Holding]:
    if what := tuple(sorted((name, amount) for name, amount in resources.items() if name in names and amount)):
        yield who, what


def _job(job: Any) -> str:
    submitted = job.config.metadata.get("job_submission_id")
    return f"job {submitted}" if submitted else f"process {job.driver_pid} on {job.driver_address.ip_address}"
