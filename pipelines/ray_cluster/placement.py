"""Placement groups for actors that start others: all of an actor's processes are placed together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@contextmanager
def placement_groups(bundles: Sequence[Mapping[str, float]]) -> Iterator[Callable[[], dict[str, Any]] | None]:
    """Yields a function whose results are Ray options of actors: each call makes a group of `bundles`, on one node if
    it has room. The actor is placed in the first bundle, and actors that it starts in the others. The groups are
    removed at the end. None for a single bundle, which needs no group."""
    groups: list[PlacementGroup] = []

    def place() -> dict[str, Any]:
        groups.append(placement_group([dict(bundle) for bundle in bundles], strategy="PACK"))
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(groups[-1], 0, True)}

    try:
        yield place if len(bundles) > 1 else None
    finally:
        for group in groups:
            remove_placement_group(group)
