"""cluster/aws.yaml, gcp.yaml and onprem.yaml: what `ray up` checks, and what it would find out too late."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest

from rcd_core.io.node_copy import CACHE
from tests.cluster.cloud_schemas import GOOGLE
from tests.cluster.files import LAUNCHED, changed, commands, launcher
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
        ("aws", "available_node_types/cpu/node_config/machineType", "x", 'Unknown parameter in input: "machineType"'),
        ("aws", "available_node_types/cpu/node_config/InstanceType", "m7i.5xlarge", "'m7i.5xlarge' is none of EC2's"),
        ("aws", "available_node_types/cpu/node_config/BlockDeviceMappings/0/Ebs/Throughput", "500", "Invalid type for"),
        ("aws", "available_node_types/cpu/node_config/BlockDeviceMappings/0/Ebs/VolumeType", "gp4", "'gp4' is none of"),
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


@pytest.mark.skipif(not GOOGLE, reason="needs google-api-python-client")
@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("InstanceType", "x", "cpu.node_config.InstanceType: unknown key"),
        ("disks/0/initializeParams/diskSizeGB", 300, "disks.initializeParams.diskSizeGB: unknown key"),
        ("disks/0/autoDelete", "yes", "disks.autoDelete: 'yes' is no boolean"),
        ("disks/0/type", "LOCAL", "disks.type: 'LOCAL' is none of PERSISTENT, SCRATCH"),
    ],
)
def test_mistakes_are_seen_by_google_s_description(path: str, value: Any, says: str) -> None:
    found = list(problems(changed(launcher("gcp"), f"available_node_types/cpu/node_config/{path}", value)))
    assert any(says in line for line in found), found


@pytest.mark.parametrize("name", LAUNCHED)
def test_shell_commands(name: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    raw = launcher(name)
    for key in ("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for command in raw[key]:
            script = command.replace("$RAY_HEAD_IP", "HEAD")  # Ray sets it
            assert _shellcheck(script) == "", command
    assert "SC" in _shellcheck('for x in $(ls *.txt); do echo $x; done; if [ "$a" = 1 ]')


def _shellcheck(script: str) -> str:
    return subprocess.run(["shellcheck", "-s", "bash", "-"], input=script, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_scratch_is_a_directory_that_exists(name: str) -> None:
    """On the machine before the container starts, owned by its user, and the variables point into it."""
    raw = launcher(name)
    (volume,) = [option.split()[1] for option in raw["docker"]["run_options"] if option.startswith("--volume")]
    outside, inside = volume.split(":")
    made = [words for line in raw["initialization_commands"] for words in commands(line) if "install" in words]
    assert len(made) == 1 and made[0][:7] == ["sudo", "install", "-d", "-o", "1000", "-g", "1000"]
    assert made[0][7:] == [outside, f"{outside}/tmp"]
    variables = dict(o.split()[1].split("=") for o in raw["docker"]["run_options"] if o.startswith("--env"))
    assert variables["TMPDIR"] == f"{inside}/tmp"
    assert all(variables[name].startswith(f"{inside}/") for name in (CACHE, "HF_HOME"))
    assert variables["HF_TOKEN_PATH"] == "/home/ray/.hub_token", "the container's ~/.hub_token, as in file_mounts"


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_the_same_group_on_demand_is_the_one_to_fall_back_to(name: str) -> None:
    groups = launcher(name)["available_node_types"]
    spot, on_demand = groups["reference_spot"], groups["reference"]
    assert spot["resources"] == on_demand["resources"] and spot["priority"] > on_demand["priority"]
    market = {"aws": "InstanceMarketOptions", "gcp": "scheduling"}[name]
    rest = [{k: v for k, v in group["node_config"].items() if k != market} for group in (spot, on_demand)]
    assert rest[0] == rest[1] and spot["node_config"][market] != on_demand["node_config"].get(market)
