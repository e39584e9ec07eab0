"""A node that gets SIGTERM, as a pod that Kubernetes stops, ends its work first: kuberay/ relies on it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster.files import kuberay, ray_cluster_spec
from tests.cluster.nodes import elsewhere
from tests.pipelines.serving.serve_run import free_port

IP = "127.0.0.1"


def drain_s() -> str:
    """The variable's value in the files."""
    container = ray_cluster_spec(kuberay("rayservice"))["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    (value,) = [v["value"] for v in container["env"] if v["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
    return str(value)


@contextmanager
def started(*options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`ray start --block`, which KubeRay runs in a container. Its processes are killed at the end."""
    ports = [f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"]
    command = [str(Path(sysconfig.get_path("scripts"), "ray")), "start", "--block", f"--node-ip-address={IP}", *ports]
    streams: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, "--object-store-memory=80000000", *options], **streams)
    try:
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait()


def drained(directory: str, seconds: str) -> dict[str, Any]:
    os.environ |= {"RAY_TMPDIR": directory, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": seconds}
    import ray

    address = f"{IP}:{free_port()}"
    with started("--head", f"--port={address.split(':')[1]}", "--num-cpus=0", "--include-dashboard=false"):
        deadline = time.monotonic() + 120
        while not ray.is_initialized():
            try:
                ray.init(address, log_to_driver=False, _node_ip_address=IP)
            except Exception:
                assert time.monotonic() < deadline
                time.sleep(1)
        with started(f"--address={address}", "--num-cpus=1") as node:

            def work(pause_s: float) -> str:
                time.sleep(pause_s)
                return "done"

            task = ray.remote(num_cpus=1, max_retries=0)(work)
            ray.get(task.remote(0), timeout=120)
            running = task.remote(15)
            time.sleep(5)
            node.send_signal(signal.SIGTERM)
            stopped = time.monotonic()
            time.sleep(1)
            later = task.remote(0)
            answer = ray.get(running, timeout=120)
            node.wait(timeout=120)
            took = time.monotonic() - stopped
            taken, _ = ray.wait([later], timeout=3)
            ray.shutdown()
            return {"answer": answer, "took": took, "taken": len(taken)}


@pytest.mark.drill
def test_a_stopped_node_ends_its_task_takes_no_other_and_does_not_wait_longer() -> None:
    directory = tempfile.mkdtemp(prefix="rcd-drain-", dir="/tmp")  # short, as it holds Unix sockets
    try:
        result = elsewhere(drained, directory, drain_s())
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    assert result["answer"] == "done" and result["taken"] == 0
    assert 5 < result["took"] < 100 < float(drain_s())
