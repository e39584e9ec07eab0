"""Waits until the cluster has the resources of a stage, with a deadline."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.ray_cluster.holders import holders
from rcd_core.errors import UserError

Bundle = Mapping[str, float]
_REPORT_EVERY_S = 10.0
_GROUP = "ray.io/node-group"  # label that launchers set on their nodes


def wait_for_resources(
    bundles: Sequence[Bundle],
    timeout_s: float,
    what: str,
    *,
    free: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Wait until the cluster can hold the bundles, each on one node; with free, until they are idle as well.

    On nodes of a launcher (ray up, KubeRay) an autoscaler may add more, so only free resources are waited for there. A
    placement group requests them, as autoscalers react to those. Other nodes may be added by hand. Raises UserError at
    the deadline, with the wanted and present resources, their holders and the remedy.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

    start = time.monotonic()
    last_report = start - _REPORT_EVERY_S
    group: PlacementGroup | None = None
    try:
        while True:
            alive = [node for node in ray.nodes() if node["Alive"]]
            nodes = [node["Resources"] for node in alive]
            idle = ray.available_resources() if free else _total(nodes)
            fits = _fits(bundles, nodes)
            enough = fits and all(idle.get(k, 0.0) >= v for k, v in _total(bundles).items())
            may_grow = not free and can_grow(alive)
            if group.wait(timeout_seconds=1) if group is not None else enough or may_grow:
                return
            now = time.monotonic()
            late = now - start >= timeout_s
            if late or now - last_report >= _REPORT_EVERY_S:
                last_report, state = now, _state(bundles, nodes, idle if fits else None)
                if late:
                    raise UserError(f"no resources for {what} after {timeout_s:g} s: {state}; {_remedy(fits)}")
                say(f"waiting for resources for {what}: {state}; {timeout_s - (now - start):.0f} s left")
            if free and group is None:
                group = placement_group([dict(bundle) for bundle in bundles if bundle], strategy="PACK")
            time.sleep(min(1.0, max(0.05, timeout_s - (now - start))))
    finally:
        if group is not None:  # the stage requests the resources itself
            remove_placement_group(group)


def can_grow(nodes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these nodes, of ray.nodes(), are those of a launcher, whose autoscaler may add others."""
    return any(_GROUP in node["Labels"] for node in nodes)


def _state(bundles: Sequence[Bundle], nodes: Sequence[Bundle], idle: Bundle | None) -> str:
    """idle: the unused resources, where the nodes would be large enough."""
    text = f"wanted {describe_bundles(bundles)}; present {_describe(_total(nodes), bundles)} on {len(nodes)} node(s)"
    if idle is not None:
        text += f", of which idle {_describe(idle, bundles)}"
        if names := holders(_total(bundles)):
            text += f"; held by {', '.join(names)}"
    return text


def _remedy(would_fit: bool) -> str:
    if would_fit:
        return (
            "stop what holds them: a job with `ray job stop`, a served model with full.py --teardown; "
            "or raise resources.timeout_s"
        )
    return "add nodes, lower resources.num_workers or similar keys of the recipe, or raise resources.timeout_s"


def _fits(bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> bool:
    """First-fit decreasing, which is exact for equal bundles, as all stages have them."""
    room = [dict(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda b: (b.get("GPU", 0), b.get("CPU", 0)), reverse=True):
        node = next((r for r in room if all(r.get(k, 0.0) >= v for k, v in bundle.items())), None)
        if node is None:
            return False
        for k, v in bundle.items():
            node[k] -= v
    return True


def _total(bundles: Sequence[Bundle]) -> dict[str, float]:
    names = {name for bundle in bundles for name in bundle}
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in names}


def _describe(amounts: Bundle, like: Sequence[Bundle]) -> str:
    names = sorted({name for bundle in like for name in bundle})
    return ", ".join(f"{name} {amounts.get(name, 0.0):g}" for name in names)


def describe_bundles(bundles: Sequence[Bundle]) -> str:
    """Bundles as text: "2 x (CPU 1, GPU 1)"."""
    kinds = Counter(_describe(bundle, [bundle]) for bundle in bundles)
    return " and ".join(f"{count} x ({kind})" for kind, count in kinds.items())
