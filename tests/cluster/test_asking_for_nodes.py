"""A waiting stage asks for its nodes: the autoscaler sees the demand, and new nodes are used."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

DRIVER = """
import os, sys, threading, time
import ray
from ray._raylet import GcsClient
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.cluster_utils import Cluster
from pipelines.ray_cluster.resources import wait_for_resources
from rcd_core.errors import UserError

WANTED = [{"CPU": 1.0, "reference_node": 0.001}] * 2

def seen():
    state = get_cluster_resource_state(GcsClient(address=cluster.address))
    groups = [group.bundle_selectors[0].resource_requests for group in state.pending_gang_resource_requests]
    return [[dict(request.resources_bundle) for request in group] for group in groups]

def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)

# The group name, as `ray up` and KubeRay set it.
os.environ["RAY_NODE_TYPE_NAME"] = "head"
head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": sys.argv[1]}
cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
try:
    ray.init(address=cluster.address, log_to_driver=False)
    wait_for_resources(WANTED, 0, "a later stage")  # before the first stage: no demand, no waiting
    assert seen() == []
    try:
        wait_for_resources(WANTED, 0.5, "stage signals", free=True, say=print)
    except UserError as error:
        assert "wanted 2 x (CPU 1, reference_node 0.001)" in str(error), error
    until(lambda: seen() == [])
    waiting = threading.Thread(target=wait_for_resources, args=(WANTED, 60, "stage signals"), kwargs={"free": True})
    waiting.start()
    until(lambda: seen() == [WANTED])
    cluster.add_node(num_cpus=2)  # of another group
    assert waiting.is_alive() and seen() == [WANTED]
    cluster.add_node(num_cpus=2, resources={"reference_node": 1})
    waiting.join(30)
    assert not waiting.is_alive()
    until(lambda: ray.available_resources().get("CPU") == 4)  # everything is released
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.drill
def test_what_a_stage_waits_for_is_asked_for() -> None:
    with tempfile.TemporaryDirectory(prefix="rcd-test-", dir="/tmp", ignore_cleanup_errors=True) as temp_dir:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-c", DRIVER, temp_dir]
        process = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert process.returncode == 0, process.stderr
    assert "waiting for resources for stage signals: wanted 2 x (CPU 1, reference_node 0.001)" in process.stdout


EVALUATION = """
import os, subprocess, sys, time
from ray.cluster_utils import Cluster
from tests.cluster.nodes import resource_state
from tests.pipelines.serving.serve_run import START, save_model
from pathlib import Path

def wanted():
    groups = [group.bundle_selectors[0] for group in resource_state(cluster).pending_gang_resource_requests]
    return [dict(request.resources_bundle) for group in groups for request in group.resource_requests]

storage = Path(sys.argv[1])
save_model(storage / "model", START, 0)
(storage / "test.jsonl").write_text('{"question": "words", "answer": "1"}')
os.environ["RAY_NODE_TYPE_NAME"] = "head"
head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": sys.argv[1] + "/ray"}
cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
try:
    command = [sys.executable, "-m", "pipelines.cli.main", "evaluate", "--address", cluster.address, "--task", "qa"]
    command += ["--target", str(storage / "model"), "--test", str(storage / "test.jsonl"), "--thresholds", "0.5"]
    process = subprocess.Popen([*command, "--output", str(storage / "out")], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while {"CPU": 1.0, "GPU": 1.0} not in wanted():
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    cluster.add_node(num_cpus=2, num_gpus=1)
    print(process.communicate(timeout=90)[1])
finally:
    process.kill()
    cluster.shutdown()
"""


@pytest.mark.drill
def test_an_evaluation_asks_for_a_gpu_that_is_not_there_yet() -> None:
    """The node that is added has a GPU by its description only, so decoding refuses it instead of using the CPU."""
    with tempfile.TemporaryDirectory(prefix="rcd-test-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-c", EVALUATION, directory]
        process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "--gpus 0" in process.stdout and "gpus_per_worker" in process.stdout
