"""cluster/aws.yaml, gcp.yaml and onprem.yaml: what `ray up` checks, and what it would find out too late."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.files import LAUNCHED, changed, launcher
from tests.cluster.launcher import problems


@pytest.mark.parametrize("name", LAUNCHED)
def test_nothing_is_wrong(name: str) -> None:
    assert list(problems(launcher(name))) == []


@pytest.mark.parametrize(
    ("name", "path", "value", "says"),
    [
        ("aws", "idle_timeout", 3, "ray up: Additional properties are not allowed ('idle_timeout'"),
        ("aws", "max_workers", "many", "ray up: 'many' is not of type 'integer'"),
        ("aws", "head_node_type", "heads", "ray up: `head_node_type` must be one of"),
        ("aws", "available_node_types/cpu/resources", None, "ray up: 'resources' is a required property"),
        ("aws", "available_node_types/cpu/resources/CPU", 1.5, "ray up: 1.5 is not of type 'integer'"),
        ("onprem", "available_node_types", {"a": {"resources": {}, "node_config": {}}}, "not supported for on-premise"),
        ("onprem", "max_workers", 5, "max_workers: not as many as worker_ips"),
        ("aws", "provider/avail_zone", "x", "provider.avail_zone: unknown key"),
        ("gcp", "available_node_types/cpu/node_config/InstanceType", "x", "cpu.node_config.InstanceType: unknown key"),
        ("aws", "available_node_types/head/resources/CPU", 8, "head.resources: a head offers {CPU: 0}"),
        ("aws", "available_node_types/target/resources/GPU", 4, "target.resources: {'CPU': 192, 'GPU': 4"),
        ("gcp", "available_node_types/reference/min_workers", 1, "reference.min_workers: nodes that nobody"),
        ("gcp", "available_node_types/target/max_workers", -1, "target.max_workers: -1 of 16"),
        ("gcp", "available_node_types/target/max_workers", None, "target: min_workers and max_workers"),
        ("aws", "head_start_ray_commands/1", "ray start --head --dashbord", "No such option"),
        ("aws", "head_start_ray_commands/1", "ray start --head --dashboard-host=0.0.0.0", "127.0.0.1 is missing"),
        ("aws", "head_start_ray_commands/1", "ray start --head", "head_start_ray_commands: no token is asked for"),
        ("gcp", "worker_start_ray_commands/1", "ray stop", "worker_start_ray_commands: 0 times `ray start`"),
        ("gcp", "file_mounts", {}, "file_mounts: the token does not reach"),
        ("onprem", "docker/run_options", [], "docker.run_options: --env RAY_AUTH_MODE=token is missing"),
        ("aws", "docker/run_options/0", "--privileged", "docker.run_options: --privileged"),
    ],
)
def test_mistakes_are_seen(name: str, path: str, value: Any, says: str) -> None:
    found = list(problems(changed(launcher(name), path, value)))
    assert any(says in line for line in found), found


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_the_same_group_on_demand_is_the_one_to_fall_back_to(name: str) -> None:
    groups = launcher(name)["available_node_types"]
    spot, on_demand = groups["reference_spot"], groups["reference"]
    assert spot["resources"] == on_demand["resources"] and spot["priority"] > on_demand["priority"]
    market = {"aws": "InstanceMarketOptions", "gcp": "scheduling"}[name]
    rest = [{k: v for k, v in group["node_config"].items() if k != market} for group in (spot, on_demand)]
    assert rest[0] == rest[1] and spot["node_config"][market] != on_demand["node_config"].get(market)
