"""A node goes away under an evaluation, and under served models: nothing is missing, nothing is wrong.

For signals and trainings see test_precompute_kills.py and test_train_nodes.py.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import evaluate, serve
from pipelines.evaluation.actor import DecodeActor
from pipelines.recipe.model import Resources
from pipelines.run.directory import StageContext
from tests.cluster.nodes import elsewhere, local_nodes
from tests.fault_table import FaultTable
from tests.pipelines.serving import test_serve_faults
from tests.pipelines.serving.serve_run import metrics, serve_context, until
from tests.pipelines.test_evaluate import STAGES, make_recipe, stage_context, timeless
from tests.pipelines.test_evaluate import make_run as make_run  # fixtures
from tests.pipelines.test_evaluate import sudoku as sudoku
from tests.pipelines.test_precompute_kills import begun_again

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]
LOST = "a worker node removed"


# -- evaluation


class SlowActor(DecodeActor):
    """Leaves a mark when it begins a piece, and takes its time."""

    def decode(self, number: int) -> int:
        Path(self.plan.parts).parent.mkdir(exist_ok=True)
        Path(self.plan.parts).parent.joinpath(f"begun-{number}-{os.getpid()}").touch()
        time.sleep(1)
        return super().decode(number)


def lose_a_node_of_an_evaluation(storage: str) -> float:
    """Seconds until another actor has begun what the lost one had."""
    ctx = stage_context(make_recipe(Path(storage)), "lost", ("prepare", *STAGES))
    lost: list[float] = []

    with local_nodes({"num_cpus": 1}, {"num_cpus": 1}) as (cluster, nodes):

        def lose_one() -> None:
            until(lambda: len(list(Path(ctx.directory).glob("begun-*"))) >= 4)
            lost.append(time.time())
            cluster.remove_node(nodes[0], allow_graceful=False)

        thread = threading.Thread(target=lose_one, daemon=True)
        thread.start()
        evaluate.DecodeActor = SlowActor  # type: ignore[misc]
        evaluate.run(ctx)
        thread.join()
    return min(begun_again(Path(ctx.directory))) - lost[0]


@pytest.mark.faults(LOST, "evaluate")
def test_an_evaluation_goes_on_without_the_node(sudoku: StageContext, fault_table: FaultTable) -> None:  # noqa: F811
    seconds = elsewhere(lose_a_node_of_an_evaluation, sudoku.recipe.storage, timeout=200)
    ctx = stage_context(sudoku.recipe, "lost", sudoku.inputs)
    assert timeless(ctx) == timeless(sudoku)
    fault_table.add("the other node decoded its unfinished answers", "the same answers", seconds)


# -- serving


def lose_a_node_under_load(storage: str) -> dict[str, Any]:
    """One replica on each of two nodes, eight streams and eight requests; a third node comes after the loss."""
    replicas = {"min_replicas": 2, "max_replicas": 2, "start": "zero"}
    ctx = serve_context(Path(storage), test_serve_faults.SLOWER, baseline=False, **replicas)
    apart = Resources(custom={"deploy": {"place": 1.0}})
    ctx = replace(ctx, recipe=ctx.recipe.model_copy(update={"resources": apart}))
    node = {"num_cpus": 1, "resources": {"place": 1}}
    seeds = range(1, 17)
    want = test_serve_faults.undisturbed(ctx, seeds, start="zero")
    with local_nodes(node, node) as (cluster, nodes):
        serve.run(ctx)
        until(lambda: len(test_serve_faults.alive("Target")) == 2)
        started = threading.Semaphore(0)
        with ThreadPoolExecutor(16) as threads:
            whole = [threads.submit(test_serve_faults.ask, ctx, seed, False) for seed in seeds[8:]]
            streams = [threads.submit(test_serve_faults.ask, ctx, seed, True, started) for seed in seeds[:8]]
            for _ in range(8):
                assert started.acquire(timeout=100)
            lost = time.monotonic()
            cluster.remove_node(nodes[0], allow_graceful=False)
            cluster.add_node(**node)
            found = [future.result(timeout=300).text for future in [*streams, *whole]]
        until(lambda: len(test_serve_faults.alive("Target")) == 2, seconds=200)
        seconds = time.monotonic() - lost
        retries = metrics(ctx)["retries_total"]
        serve.teardown(ctx)
    return {"right": [a == b for a, b in zip(found, want, strict=True)], "retries": retries, "seconds": seconds}


@pytest.mark.faults(LOST, "deploy")
def test_requests_go_on_elsewhere(tmp_path: Path, fault_table: FaultTable) -> None:
    found = elsewhere(lose_a_node_under_load, str(tmp_path))
    assert all(found["right"]) and len(found["right"]) == 16
    assert found["retries"] > 0, "the loss struck somebody"
    happened = "of 16 requests, those on it were resumed elsewhere; its replica restarted on a new node"
    fault_table.add(happened, "no request failed, the same texts", found["seconds"])
