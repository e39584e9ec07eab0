"""A job that starts on a head alone: each stage asks for what demands() predicts, new nodes are used, and they are idle
for an autoscaler when the stage is over."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.core.generated import autoscaler_pb2

from pipelines.recipe.load import load_recipe
from pipelines.recipe.model import Recipe
from tests.cluster.demands import demands
from tests.cluster.nodes import ROOT, elsewhere, local_nodes, resource_state

PLACED = ("base", "reference", "signals", "target", "baseline", "evaluate", "deploy")
STAYS_S = 4.0  # a demand pending this long is not just being scheduled
Bundle = dict[str, float]


def settings(storage: str, port: int) -> list[str]:
    """Every stage has its own node group, so that a demand identifies its stage."""
    from tests.pipelines.test_job import FEW

    places = ", ".join(f"{stage}: {{{stage}_node: 0.001}}" for stage in PLACED)
    few = [*FEW, "data.num_train=256", "data.num_test=6", "evaluate.thresholds=[0.9]", "variants={}", "calibrate=null"]
    few += ["base.train.steps=8", "evaluate.starts=[zero]", "deploy.start=zero", f"deploy.port={port}"]
    return [*few, f"storage={storage}", f"resources.custom={{{places}}}"]


def stage_of(bundle: Bundle) -> str:
    return next((name.removesuffix("_node") for name in bundle if name.endswith("_node")), "prepare")


def asked(state: Any) -> Iterator[tuple[str, list[Bundle]]]:
    """Pending (kind, bundles): each placement group, and all single actors and tasks of a stage together."""
    for group in state.pending_gang_resource_requests:
        (selector,) = group.bundle_selectors
        yield "together", [dict(request.resources_bundle) for request in selector.resource_requests]
    single: dict[str, list[Bundle]] = {}
    for pending in state.pending_resource_requests:
        bundle = dict(pending.request.resources_bundle)
        single.setdefault(stage_of(bundle), []).extend([bundle] * pending.count)
    for bundles in single.values():
        yield "singly", bundles


class Provider:
    """A minimal autoscaler: adds a node per bundle that stays pending, and removes nodes that are idle after their
    stage."""

    def __init__(self, cluster: Any, run: Path) -> None:
        self.cluster, self.run = cluster, run
        self.found: dict[str, dict[str, list[Bundle]]] = {}  # stage -> kind -> largest simultaneous demand
        self.nodes: dict[str, list[Any]] = {}
        self.since: list[tuple[float, str, list[Bundle]]] = []

    def look(self) -> None:
        now, before = time.monotonic(), self.since
        self.since = []
        for kind, bundles in asked(resource_state(self.cluster)):
            first = next((when for when, *same in before if same == [kind, bundles]), now)
            self.since.append((first, kind, bundles))
            if now - first >= STAYS_S:
                self._add(kind, bundles)
        for stage, nodes in self.nodes.items():
            if stage != "deploy" and nodes and (self.run / stage / "manifest.json").exists():
                self.remove(stage)

    def _add(self, kind: str, bundles: list[Bundle]) -> None:
        (stage,) = {stage_of(bundle) for bundle in bundles}
        known = self.found.setdefault(stage, {}).setdefault(kind, [])
        for bundle in bundles[len(known) :]:
            known.append(bundle)
            place = {f"{stage}_node": 1.0} if stage != "prepare" else {}
            self.nodes.setdefault(stage, []).append(self.cluster.add_node(num_cpus=1, resources=place))

    def remove(self, stage: str) -> None:
        """Removes nodes that the autoscaler's state calls idle: no actor, task, object or reservation."""
        ids = {node.node_id for node in self.nodes[stage]}
        deadline = time.monotonic() + 120
        while busy := [node for node in resource_state(self.cluster).node_states if self._busy(node, ids)]:
            assert time.monotonic() < deadline, (stage, [list(node.node_activity) for node in busy])
            time.sleep(0.2)
        for node in self.nodes[stage]:
            self.cluster.remove_node(node)
        self.nodes[stage] = []

    def _busy(self, node: Any, ids: set[str]) -> bool:
        return node.node_id.hex() in ids and node.status != autoscaler_pb2.NodeStatus.IDLE


def record(storage: str, port: str) -> dict[str, Any]:
    os.environ["RAY_NODE_TYPE_NAME"] = "head"  # as `ray up` and KubeRay start a head
    command = [sys.executable, str(ROOT / "pipelines" / "full.py"), "--recipe", "sudoku-reference"]
    command += [word for setting in settings(storage, int(port)) for word in ("--set", setting)]
    with local_nodes() as (cluster, _):
        environment = {**os.environ, "RAY_ADDRESS": cluster.address, "OMP_NUM_THREADS": "1"}
        with open(f"{storage}/out", "w+") as out:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
            try:
                provider = Provider(cluster, Path(storage, "sudoku-reference"))
                while process.poll() is None:
                    provider.look()
                    time.sleep(1)
            finally:
                process.kill()
                process.wait()
            out.seek(0)
            assert process.returncode == 0, out.read()[-4000:]
        subprocess.run([*command, "--teardown"], cwd=ROOT, env=environment, check=True, capture_output=True)
        provider.remove("deploy")
    return provider.found


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_what_is_asked_for_is_what_is_said_and_what_comes_is_used(tmp_path: Path) -> None:
    from tests.pipelines.test_job import free_port

    port = free_port()
    found = elsewhere(record, str(tmp_path), str(port), timeout=800)
    recipe: Recipe = load_recipe("sudoku-reference", settings(str(tmp_path), port))
    said = {stage: [dict(bundle) for bundle in bundles] for stage, bundles in demands(recipe).items()}
    (one, two) = said.pop("signals")
    signals = found.pop("signals")
    assert one == two and signals == {"together": [one], "singly": [one]}, "it begins with one, and asks for more"
    assert {stage: kinds["together"] for stage, kinds in found.items()} == said
    for stage, kinds in found.items():  # actors waiting for a worker process
        assert all(bundle in said[stage] for bundle in kinds.get("singly", []))
