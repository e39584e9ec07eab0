"""Resource demands of stages against the node groups of the cluster files, decided by Ray's own autoscaler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingReply, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest

from pipelines.recipe.files import recipe_names
from pipelines.recipe.load import load_recipe
from pipelines.serving.config_file import read_config
from pipelines.serving.description import bundle, parse_description
from tests.cluster.demands import Bundle, demands
from tests.cluster.files import CLUSTER, changed, kuberay, launcher, ray_cluster_spec

PLACED = "cluster-sdar-8b"
TRAININGS = ("base", "reference", "target", "baseline")


def autoscaling(name: str) -> AutoscalingConfig:
    """The node groups of a file as Ray's autoscaler sees them."""
    raw: dict[str, Any]
    if name in ("aws", "gcp"):
        raw = launcher(name)
    else:
        raw = _derive_autoscaling_config_from_ray_cr(
            {"metadata": {"name": "rcd", "namespace": "default"}, "spec": ray_cluster_spec(kuberay(name))}
        )
    return AutoscalingConfig(raw, skip_content_hash=True)


def ask(config: AutoscalingConfig, bundles: Sequence[Bundle], together: bool = False) -> SchedulingReply:
    """together: one placement group (PACK), all or nothing, like the workers of a training."""
    requests = [ResourceRequestUtil.make(dict(bundle)) for bundle in bundles]
    gang = [GangResourceRequest(requests=requests)] if together else []
    return ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=[] if together else ResourceRequestUtil.group_by_count(requests),
            gang_resource_requests=gang,
        )
    )


def started(reply: SchedulingReply) -> dict[str, int]:
    assert not reply.infeasible_resource_requests and not reply.infeasible_gang_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def nodes(config: AutoscalingConfig, recipe: str, *overrides: str) -> dict[str, dict[str, int]]:
    """Stage -> nodes that an empty cluster would start for it."""
    asked = demands(load_recipe(recipe, overrides))
    return {
        stage: started(ask(config, bundles, together=stage.partition("-")[0] in TRAININGS))
        for stage, bundles in asked.items()
    }


@pytest.mark.parametrize("name", ["aws", "gcp", "raycluster"])
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_stage_of_every_recipe_can_run(name: str, recipe: str) -> None:
    for stage, found in nodes(autoscaling(name), recipe).items():
        assert found and "head" not in found and "headgroup" not in found, stage


@pytest.mark.parametrize("name", ["aws", "gcp", "raycluster"])
def test_stages_start_the_nodes_of_their_group(name: str) -> None:
    reference = "reference" if name == "raycluster" else "reference_spot"
    warm = ("deploy.start=reference", "deploy.max_replicas=2")
    assert nodes(autoscaling(name), PLACED, *warm) == {
        "prepare": {"cpu": 1},
        "reference": {"target": 1},
        "signals": {reference: 8},
        "target": {"target": 1},
        "baseline": {"target": 1},
        "evaluate": {"target": 1},
        "deploy": {"target": 1, reference: 2},
    }


def test_without_placement_a_stage_takes_any_gpu() -> None:
    assert set(nodes(autoscaling("aws"), "sdar-8b-b32")["signals"]) != {"reference_spot"}


def test_what_no_group_offers_is_seen() -> None:
    config = autoscaling("aws")
    for wanted in ({"GPU": 1, "nowhere": 0.001}, {"CPU": 193}, {"CPU": 17, "reference_node": 0.001}, {"GPU": 9}):
        assert ask(config, [wanted]).infeasible_resource_requests
    too_many = [{"CPU": 8, "GPU": 1, "target_node": 0.001}] * 17
    assert ask(config, too_many, together=True).infeasible_gang_resource_requests
    lacking = changed(launcher("aws"), "available_node_types/target/resources", {"CPU": 192, "GPU": 8})
    with pytest.raises(AssertionError):
        nodes(AutoscalingConfig(lacking, skip_content_hash=True), PLACED)


def test_the_service_s_replicas_can_start() -> None:
    served = yaml.safe_load(kuberay("rayservice")["spec"]["serveConfigV2"])
    every = {"rayservice": served, "aws": read_config(str(CLUSTER / "serve.yaml"))}
    for name, config in every.items():
        replicas = parse_description(config["applications"][0]["args"]).replicas
        bundles = [bundle(one) for one in replicas for _ in range(one.max_replicas)]
        assert started(ask(autoscaling(name), bundles))
