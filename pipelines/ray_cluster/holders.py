"""Who holds what of a cluster: said to a user whose job waits for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Bundle = Mapping[str, float]
Held = tuple[str, tuple[tuple[str, float], ...]]  # holder, what each of its processes has
_REPLICA = "SERVE_REPLICA::"  # + application#deployment#id: the names that Serve gives its actors


def holders(names: Iterable[str]) -> list[str]:
    """Those that hold some of the named resources: jobs by what `ray job stop` wants, and served applications.

    One line each, as "job raysubmit_1 (2 x CPU 1)", which includes what an idle placement group has reserved. Tasks
    are not in it: Ray keeps no table of them. Empty where this Ray cannot be asked.
    """
    try:
        found = Counter(_held(set(names)))
    except (ImportError, AttributeError, TypeError):  # private tables: without them a message is only shorter
        return []
    of: dict[str, list[str]] = {}
    for (who, what), count in sorted(found.items()):
        of.setdefault(who, []).append(f"{count} x " + ", ".join(f"{name} {amount:g}" for name, amount in what))
    return [f"{who} ({'; '.join(parts)})" for who, parts in of.items()]


def _held(names: set[str]) -> Iterator[Held]:
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    schema: Any = gcs_pb2  # its classes are made when it is imported
    tables = state._connect_and_get_accessor()
    listed = tables.get_job_table(skip_submission_job_info_field=True, skip_is_running_tasks_field=True)
    jobs = {job.job_id: _job(job) for job in map(schema.JobTableData.FromString, listed)}
    for group in map(schema.PlacementGroupTableData.FromString, tables.get_placement_group_table()):
        if group.state == schema.PlacementGroupTableData.CREATED:
            for bundle in group.bundles:
                yield from _of(jobs.get(group.creator_job_id, "a job that has ended"), bundle.unit_resources, names)
    for actor in map(schema.ActorTableData.FromString, tables.get_actor_table(None, "ALIVE")):
        if not actor.placement_group_id:  # the others are in their group's bundles
            served = actor.name.removeprefix(_REPLICA).partition("#")[0] if actor.name.startswith(_REPLICA) else ""
            who = f"the served application {served}" if served else jobs.get(actor.job_id, "a job that has ended")
            yield from _of(who, actor.required_resources, names)


def _of(who: str, resources: Bundle, names: set[str]) -> Iterator[Held]:
    if what := tuple(sorted((name, amount) for name, amount in resources.items() if name in names and amount)):
        yield who, what


def _job(job: Any) -> str:
    submitted = job.config.metadata.get("job_submission_id")
    return f"job {submitted}" if submitted else f"process {job.driver_pid} on {job.driver_address.ip_address}"
