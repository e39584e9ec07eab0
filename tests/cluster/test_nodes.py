"""The whole job by one `ray job submit` line, on one node and on three: equal artefacts, each stage on its nodes, a
quick stop, and nothing left after teardown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from pipelines.ray_cluster.local import Head, stop_job
from pipelines.run.directory import RunDirectory
from pipelines.run.lease import read_lease
from rcd_core.io import storage
from tests.cluster.nodes import ROOT, actors, elsewhere, local_nodes
from tests.pipelines.serving.serve_run import until
from tests.pipelines.test_job import FEW, free_port
from tests.s3_server import s3_server

BIN = Path(sys.executable).parent
STAGES = ("prepare", "base", "reference", "signals", "target", "baseline", "evaluate")
PLACES = dict.fromkeys(("signals", "deploy-reference"), {"reference_node": 0.001})
PLACES |= dict.fromkeys(("base", "reference", "target*", "baseline*", "evaluate", "deploy"), {"target_node": 0.001})
HEAD, REFERENCE, TARGET = "head", "reference", "target"


class Submitter:
    """Runs the command that a user types against a cluster."""

    def __init__(self, head: Head, root: str) -> None:
        few = ["data.num_train=256", "data.num_test=6", "evaluate.thresholds=[0.9]", "variants={}", "calibrate=null"]
        few += ["base.train.log_every=1", "base.train.steps=150"]
        few += [f"deploy.port={free_port()}", f"resources.custom={json.dumps(PLACES)}"]
        self.head = head
        self.job = ["python", "pipelines/full.py", "--recipe", "sudoku-reference", "--storage", root]
        self.job += [word for setting in [*FEW, *few] for word in ("--set", setting)]

    def submit(self, *options: str, more: tuple[str, ...] = ()) -> str:
        """Output of `ray job submit` with these arguments; returns when the job ends."""
        return self.ray("submit", "--working-dir", ".", *more, "--", *self.job, *options)

    def ray(self, command: str, *words: str) -> str:
        line = [str(BIN / "ray"), "job", command, "--address", self.head.dashboard, *words]
        try:
            done = subprocess.run(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{command} does not end:\n{(error.stdout or b'')[-5000:].decode()}") from error
        assert done.returncode == 0, done.stdout[-5000:].decode()
        return done.stdout.decode()


def whole_job(nodes: str, root: str) -> dict[str, Any]:
    """nodes: "1" or "3". root: the storage. Returns the manifests of the stages and the nodes of the actors."""
    os.environ["PATH"] = os.pathsep.join([str(BIN), os.environ["PATH"]])  # a job's `python`
    os.environ |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    places = {"reference_node": 1, "target_node": 1}
    port, agent = free_port(), free_port()
    head: dict[str, Any] = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    head |= {"dashboard_agent_listen_port": agent}
    groups = []
    if nodes == "1":  # as many CPUs as a stage has workers
        head |= {"num_cpus": 2, "resources": places}
    else:
        of_each = {"num_cpus": 2, "dashboard_agent_listen_port": 0}
        groups = [{**of_each, "resources": {name: 1}} for name in places]
    with local_nodes(*groups, **head) as (cluster, added):
        ours = Head(
            token="",
            dashboard=f"http://127.0.0.1:{port}",
            agent=f"http://127.0.0.1:{agent}",
            gcs=cluster.address,
            temp_dir="",
        )
        until(ours.answers, seconds=120)
        user = Submitter(ours, root)
        out = user.submit()
        names = dict(zip((node.node_id for node in added), (REFERENCE, TARGET), strict=True)) if added else {}
        found = {
            "results": dict(results(root, "sudoku-reference")),
            "places": sorted(set(places_of(names))),
            "curl": "curl -s http://127.0.0.1" in out,
        }
        user.submit("--teardown")
        found["left"] = left()
        found["stopped"] = stopped(user, root) if nodes == "3" else None  # no other job runs
        return found


def results(root: str, name: str) -> Iterator[tuple[str, Any]]:
    run = RunDirectory(storage.join(root, name))
    for stage in STAGES:
        if manifest := run.manifest(stage):
            yield stage, {key: value for key, value in manifest["summary"].items() if key != "reference_checkpoint"}


def places_of(names: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(actor class, node) of working actors."""
    for actor in actors():
        replica = re.match("SERVE_REPLICA::sudoku-reference#(Target|Reference)#", actor.name)
        worker = re.search("SignalActor|DecodeActor|RayTrainWorker", actor.class_name)
        if kind := replica or worker:
            yield kind[kind.lastindex or 0], names.get(actor.node_id.hex(), HEAD)


def stopped(user: Submitter, root: str) -> dict[str, Any]:
    """Runs `ray job stop` during a training of another run, then the same command again."""
    options = ("--set", "name=stopped", "--stages", "prepare,base")
    user.submit(*options, more=("--no-wait", "--submission-id", "first"))
    run = storage.join(root, "stopped")
    until(lambda: storage.exists(storage.join(run, "base", "metrics.jsonl")), seconds=200)
    stop_job(user.head, "first")
    log = user.ray("logs", "first")
    released = read_lease(run) is None
    again = user.submit(*options)
    return {
        "said": "stopped by SIGTERM; run the same command again to resume" in log,
        "released": released,
        "went on": "base: starts, was interrupted, resumes" in again,
        "base": dict(results(root, "stopped"))["base"],
    }


RAY_DATA = {"_StatsActor", "_AutoscalingCoordinatorActor", "ActorLocationTracker"}  # one of each per cluster


def left() -> list[str]:
    """Live actors and placement groups (Serve's applications are actors). Ray Data's permanent actors are excluded as
    long as they hold no resources."""
    from ray.util.placement_group import placement_group_table

    deadline = time.monotonic() + 60
    while True:
        living = [actor for actor in actors(alive=True) if actor.required_resources or actor.class_name not in RAY_DATA]
        found = [actor.class_name for actor in living]
        found += [f"group {key}" for key, group in placement_group_table().items() if group["state"] != "REMOVED"]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


@pytest.mark.drill
@pytest.mark.timeout(1800)
def test_one_line_on_one_node_and_on_three(tmp_path: Path) -> None:
    """One node with a shared path against three nodes with an S3 bucket."""
    found = {}
    for nodes in ("1", "3"):
        with s3_server("bucket") if nodes == "3" else nullcontext():
            root = "s3://bucket/rcd" if nodes == "3" else str(tmp_path)
            found[nodes] = elsewhere(whole_job, nodes, root, timeout=900)
    one, three = found["1"], found["3"]
    assert set(one["results"]) == set(STAGES)
    assert one["results"] == three["results"]
    workers = ["DecodeActor", "RayTrainWorker", "Reference", "SignalActor", "Target"]
    assert one["places"] == [[kind, HEAD] for kind in workers]
    behind = ("Reference", "SignalActor")
    assert three["places"] == [[kind, REFERENCE if kind in behind else TARGET] for kind in workers]
    assert one["curl"] and three["curl"]
    assert one["left"] == three["left"] == []
    stop = three["stopped"]
    assert stop["said"] and stop["released"] and stop["went on"], stop
    assert stop["base"] == one["results"]["base"]
