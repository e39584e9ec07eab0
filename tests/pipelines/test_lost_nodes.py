"""A worker node is lost in the middle of each kind of stage: the results are those of an undisturbed run.

Each cluster runs in a separate process, with all its nodes on this machine.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import evaluate, precompute, serve, train
from pipelines.evaluation.actor import DecodeActor
from pipelines.recipe.model import Recipe
from pipelines.recipe.resources import Resources
from pipelines.run.directory import StageContext
from pipelines.signals.actor import SignalActor
from pipelines.training.metrics import read_metrics
from tests.cluster.nodes import elsewhere, local_nodes
from tests.fault_table import FaultTable
from tests.pipelines import signal_run, training_run
from tests.pipelines.evaluate_run import STAGES, make_recipe, stage_context, timeless
from tests.pipelines.evaluate_run import make_run as make_run  # fixtures
from tests.pipelines.evaluate_run import sudoku as sudoku
from tests.pipelines.serving import test_serve_faults
from tests.pipelines.serving.serve_run import metrics, serve_context, until
from tests.pipelines.training_run import checkpoint_steps, losses

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]
LOST = "a worker node removed"


def lose_a_node(directory: Path, num_begun: int, work: Callable[[], Any]) -> float:
    """Runs `work` on two nodes of one CPU each, and removes one once `num_begun` shards were begun. Each begun shard
    leaves a file begun-<shard>-<pid> in `directory`. Returns the seconds from the loss until a shard was begun again.
    """
    lost: list[float] = []
    with local_nodes({"num_cpus": 1}, {"num_cpus": 1}) as (cluster, nodes):

        def lose_one() -> None:
            until(lambda: len(list(directory.glob("begun-*"))) >= num_begun)
            lost.append(time.time())
            cluster.remove_node(nodes[0], allow_graceful=False)

        thread = threading.Thread(target=lose_one, daemon=True)
        thread.start()
        work()
        thread.join()
    return min(begun_again(directory)) - lost[0]


def begun_again(directory: Path) -> Iterator[float]:
    """The times at which another process began a shard again."""
    seen: set[str] = set()
    for when, shard in sorted((path.stat().st_mtime, path.name.split("-")[1]) for path in directory.glob("begun-*")):
        if shard in seen:
            yield when
        seen.add(shard)


def mark_begun(directory: Path, shard: int) -> None:
    directory.mkdir(exist_ok=True)
    (directory / f"begun-{shard}-{os.getpid()}").touch()


# -- signals


class SlowSignalActor(SignalActor):
    def compute(self, shard: int) -> Any:
        mark_begun(Path(self.job.directory), shard)
        time.sleep(2)
        return super().compute(shard)


def lose_a_node_of_signals(storage: str) -> float:
    ctx = signal_run.context(signal_run.make_recipe(Path(storage)))
    precompute.SignalActor = SlowSignalActor  # type: ignore[misc]
    return lose_a_node(Path(ctx.directory), 3, lambda: precompute.run(ctx))


@pytest.mark.faults(LOST, "signals")
def test_signals_are_computed_without_the_node(
    undisturbed: signal_run.Result, prepared: Recipe, fault_table: FaultTable
) -> None:
    seconds = elsewhere(lose_a_node_of_signals, prepared.storage)
    assert signal_run.shards_of(signal_run.context(prepared)) == undisturbed.shards
    fault_table.add("the other node computed its unfinished shards", "the same bytes", seconds)


# -- training


def lose_a_node_of_a_training(storage: str) -> dict[str, Any]:
    """Two workers on two nodes; one node is lost after a checkpoint, and a third one joins."""

    def context(name: str) -> StageContext:
        settings = {"strategy": "fsdp2", "steps": 40}
        recipe = training_run.make_recipe(Path(storage), name, train=settings, resources={"cpus_per_worker": 2})
        return training_run.context(recipe)

    with local_nodes({"num_cpus": 2}, {"num_cpus": 2}) as (cluster, nodes):
        train.run(context("quiet"))
        ctx = context("lost")
        result: dict[str, Any] = {}

        def replace_one() -> None:
            until(lambda: bool(checkpoint_steps(Path(ctx.directory))), seconds=200)
            lost = time.monotonic()
            cluster.remove_node(nodes[0], allow_graceful=False)
            before = result["before"] = read_metrics(ctx.directory)
            cluster.add_node(num_cpus=2)
            until(lambda: read_metrics(ctx.directory)[-1]["step"] > before[-1]["step"], seconds=200)
            result["seconds"] = time.monotonic() - lost

        thread = threading.Thread(target=replace_one, daemon=True)
        thread.start()
        train.run(ctx)
        thread.join(10)
    return result


@pytest.mark.faults(LOST, "target")
def test_a_training_resumes_on_a_new_node(tmp_path: Path, fault_table: FaultTable) -> None:
    result = elsewhere(lose_a_node_of_a_training, str(tmp_path), timeout=500)
    quiet, lost = (tmp_path / name / "target" for name in ("quiet", "lost"))
    before, after = result["before"], read_metrics(str(lost))
    assert 4 <= len(before) < 40
    assert after[:4] == before[:4], "same speeds: these steps did not run again"
    assert len((lost / "restarts.jsonl").read_text().splitlines()) == 1 and not (quiet / "restarts.jsonl").exists()
    assert (lost / "model/model.safetensors").read_bytes() == (quiet / "model/model.safetensors").read_bytes()
    assert losses(str(lost)) == losses(str(quiet))
    happened = "the workers restarted from the last checkpoint, one on a new node"
    fault_table.add(happened, "the same bytes", result["seconds"])


# -- evaluation


class SlowDecodeActor(DecodeActor):
    def decode(self, number: int) -> int:
        mark_begun(Path(self.plan.parts).parent, number)
        time.sleep(1)
        return super().decode(number)


def lose_a_node_of_an_evaluation(storage: str) -> float:
    ctx = stage_context(make_recipe(Path(storage)), "lost", ("prepare", *STAGES))
    evaluate.DecodeActor = SlowDecodeActor  # type: ignore[misc]
    return lose_a_node(Path(ctx.directory), 4, lambda: evaluate.run(ctx))


@pytest.mark.faults(LOST, "evaluate")
def test_an_evaluation_continues_without_the_node(sudoku: StageContext, fault_table: FaultTable) -> None:  # noqa: F811
    seconds = elsewhere(lose_a_node_of_an_evaluation, sudoku.recipe.storage, timeout=200)
    ctx = stage_context(sudoku.recipe, "lost", sudoku.inputs)
    assert timeless(ctx) == timeless(sudoku)
    fault_table.add("the other node decoded its unfinished answers", "the same answers", seconds)


# -- serving


def lose_a_node_under_load(storage: str) -> dict[str, Any]:
    """One replica on each of two nodes, eight streams and eight requests; a third node comes after the loss."""
    replicas = {"min_replicas": 2, "max_replicas": 2, "start": "zero"}
    ctx = serve_context(Path(storage), test_serve_faults.SLOWER, baseline=False, **replicas)
    spread = Resources(custom={"deploy": {"place": 1.0}})
    ctx = replace(ctx, recipe=ctx.recipe.model_copy(update={"resources": spread}))
    node = {"num_cpus": 1, "resources": {"place": 1}}
    seeds = range(1, 17)
    expected = test_serve_faults.undisturbed(ctx, seeds, start="zero")
    with local_nodes(node, node) as (cluster, nodes):
        serve.run(ctx)
        until(lambda: len(test_serve_faults.alive("Target")) == 2)
        started = threading.Semaphore(0)
        with ThreadPoolExecutor(16) as threads:
            plain = [threads.submit(test_serve_faults.ask, ctx, seed, False) for seed in seeds[8:]]
            streams = [threads.submit(test_serve_faults.ask, ctx, seed, True, started) for seed in seeds[:8]]
            for _ in range(8):
                assert started.acquire(timeout=100)
            lost = time.monotonic()
            cluster.remove_node(nodes[0], allow_graceful=False)
            cluster.add_node(**node)
            texts = [future.result(timeout=300).text for future in [*streams, *plain]]
        until(lambda: len(test_serve_faults.alive("Target")) == 2, seconds=200)
        seconds = time.monotonic() - lost
        retries = max(metrics(ctx)["retries_total"] for _ in range(9))  # of the ingress replica that answers
        serve.teardown(ctx)
    return {"right": [a == b for a, b in zip(texts, expected, strict=True)], "retries": retries, "seconds": seconds}


@pytest.mark.faults(LOST, "deploy")
def test_requests_are_resumed_on_another_node(tmp_path: Path, fault_table: FaultTable) -> None:
    result = elsewhere(lose_a_node_under_load, str(tmp_path))
    assert all(result["right"]) and len(result["right"]) == 16
    assert result["retries"] > 0
    happened = "of 16 requests, those on it were resumed elsewhere; its replica restarted on a new node"
    fault_table.add(happened, "no request failed, the same texts", result["seconds"])
