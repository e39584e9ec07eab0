"""The Ray side of a job: connecting to whatever cluster it runs on, and waiting for resources with a deadline."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from pipelines.ray_cluster.holders import holders
from rcd_core.errors import UserError

Bundle = Mapping[str, float]
_SAY_EVERY_S = 10.0
_GROUP = "ray.io/node-group"  # label of nodes that a launcher has started, with the name of their group


def wait_for_resources(
    bundles: Sequence[Bundle],
    timeout_s: float,
    what: str,
    *,
    free: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Wait until the cluster could ever hold the bundles, each on one node (free: until that much is idle as well).

    Nodes that a launcher has made (ray up, KubeRay) may become more when more is asked for: there only what is to be
    free is waited for, and asked for meanwhile by a placement group, which is what an autoscaler looks at. Other nodes
    may be added by hand. Raises UserError at the deadline, with what is wanted, what there is, who holds it, and the
    remedy.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

    start = time.monotonic()
    said = start - _SAY_EVERY_S
    asked: PlacementGroup | None = None
    try:
        while True:
            alive = [node for node in ray.nodes() if node["Alive"]]
            nodes = [node["Resources"] for node in alive]
            idle = ray.available_resources() if free else _total(nodes)
            fits = _fits(bundles, nodes)
            enough = fits and all(idle.get(k, 0.0) >= v for k, v in _total(bundles).items())
            may_come = not free and any(_GROUP in node["Labels"] for node in alive)
            if asked.wait(timeout_seconds=1) if asked is not None else enough or may_come:
                return
            now = time.monotonic()
            late = now - start >= timeout_s
            if late or now - said >= _SAY_EVERY_S:
                said, state = now, _state(bundles, nodes, idle if fits else None)
                if late:
                    raise UserError(f"no resources for {what} after {timeout_s:g} s: {state}; {_remedy(fits)}")
                say(f"waiting for resources for {what}: {state}; {timeout_s - (now - start):.0f} s left")
            if free and asked is None:
                asked = placement_group([dict(bundle) for bundle in bundles if bundle], strategy="PACK")
            time.sleep(min(1.0, max(0.05, timeout_s - (now - start))))
    finally:
        if asked is not None:  # what it holds is for the stage, which asks for it now
            remove_placement_group(asked)


def _state(bundles: Sequence[Bundle], nodes: Sequence[Bundle], idle: Bundle | None) -> str:
    """idle: where the nodes would do, what of them is not in use."""
    said = f"wanted {describe_bundles(bundles)}; present {_describe(_total(nodes), bundles)} on {len(nodes)} node(s)"
    if idle is not None:
        said += f", of which idle {_describe(idle, bundles)}"
        if held := holders(_total(bundles)):
            said += f"; held by {', '.join(held)}"
    return said


def _remedy(would_fit: bool) -> str:
    if would_fit:
        return (
            "stop what holds them: a job with `ray job stop`, the model that a recipe serves with full.py --teardown; "
            "or raise resources.timeout_s"
        )
    return "add nodes, lower resources.num_workers and its like in the recipe, or raise resources.timeout_s"


def _fits(bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> bool:
    """First-fit decreasing: exact for equal bundles, which is what stages ask for."""
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
    """Bundles in words: "2 x (CPU 1, GPU 1)"."""
    kinds = Counter(_describe(bundle, [bundle]) for bundle in bundles)
    return " and ".join(f"{count} x ({kind})" for kind, count in kinds.items())
