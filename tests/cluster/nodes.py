"""Several simulated nodes on this machine, in a separate process, so that each test starts with an empty cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def local_nodes(*nodes: dict[str, Any], join: bool = True, **head: Any) -> Iterator[tuple[Cluster, list[Any]]]:
    """Starts a cluster, and joins it unless `join` is false. head: arguments of the head, by default no CPUs. nodes:
    arguments of Cluster.add_node, one mapping per node."""
    import ray
    from ray._common.utils import get_default_ray_temp_dir
    from ray._private.utils import write_ray_address

    os.makedirs(get_default_ray_temp_dir(), exist_ok=True)  # Cluster writes a file there, whatever its temp_dir
    with tempfile.TemporaryDirectory(prefix="rcd-test-", dir="/tmp", ignore_cleanup_errors=True) as temp_dir:
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": temp_dir, **head}
        # Exit hooks need the main thread; nodes added from another thread would set them, so they are stopped below.
        cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        try:
            # Nodes on one machine share the session directory, and each one that unpacks a job's code first removes
            # what another one unpacked. Give each its own directory, as on separate machines.
            added = [cluster.add_node(runtime_env_dir_name=f"code-{i}", **node) for i, node in enumerate(nodes)]
            # Ray looks here for the cluster of a submitted job's driver. Without the file it takes any on this machine.
            write_ray_address(cluster.address, temp_dir)
            if join:
                ray.init(address=cluster.address, log_to_driver=False)
            yield cluster, added
        finally:
            ray.shutdown()
            cluster.shutdown()


def elsewhere(function: Callable[..., Any], *arguments: str, timeout: float = 400) -> Any:
    """Calls a function of a module in a new process outside the shared cluster; returns its result (as JSON)."""
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        call = f"import sys, json; from {function.__module__} import {function.__name__} as function\n"
        call += f"json.dump(function(*sys.argv[1:]), open({result.name!r}, 'w'))"
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(
            [sys.executable, "-c", call, *arguments], text=True, env=environment, cwd=ROOT, **streams
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:  # too late, or the test was ended: its cluster must not slow the tests that follow
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            raise
        assert process.returncode == 0, out[-5000:] + err[-5000:]
        return json.loads(Path(result.name).read_text())


# -- inspecting the joined cluster


def actors(*, alive: bool = False) -> list[Any]:
    """Ray's actor table (ActorTableData), dead actors included."""
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    listed = state._connect_and_get_accessor().get_actor_table(None, "ALIVE" if alive else None)
    return [gcs_pb2.ActorTableData.FromString(one) for one in listed]  # type: ignore[attr-defined]


def resource_state(cluster: Cluster) -> Any:
    """The state that an autoscaler sees: nodes and demands."""
    from ray._raylet import GcsClient
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    return get_cluster_resource_state(GcsClient(address=cluster.address))
