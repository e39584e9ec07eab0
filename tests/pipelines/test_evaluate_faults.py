"""Evaluations whose driver, or a rank of whose models, is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from pipelines import evaluate
from pipelines.evaluation.actor import Plan
from pipelines.recipe.model import Recipe
from pipelines.run.directory import StageContext
from pipelines.run.stages import stages_of
from rcd_core import load_model
from tests.fault_table import FaultTable
from tests.pipelines.evaluate_run import STAGES, make_recipe, num_decoded, stage_context, timeless
from tests.pipelines.evaluate_run import make_run as make_run  # fixtures
from tests.pipelines.evaluate_run import sudoku as sudoku


@pytest.mark.drill
@pytest.mark.faults("the driver killed while decoding", "evaluate")
def test_a_killed_evaluation_resumes_and_gives_the_same_results(
    sudoku: StageContext, monkeypatch: pytest.MonkeyPatch, fault_table: FaultTable
) -> None:
    """SIGKILL to a driver in another process, once some answers are on disk."""
    ctx = stage_context(sudoku.recipe, "killed", sudoku.inputs)
    code = (
        "from pathlib import Path; from pipelines import evaluate; from tests.pipelines import evaluate_run as t\n"
        "evaluate.FLUSH_S = 0.0\n"
        f"recipe = t.make_recipe(Path({sudoku.recipe.storage!r}))\n"
        f"evaluate.run(t.stage_context(recipe, 'killed', {sudoku.inputs!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while num_decoded(ctx) < 20:
            assert process.poll() is None and time.monotonic() < deadline, process.returncode
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (Path(ctx.directory) / "results.parquet").exists()
    again: list[Plan] = []
    decode = evaluate._decode
    monkeypatch.setattr(evaluate, "_decode", lambda ctx, plan: (again.append(plan), decode(ctx, plan)))
    evaluate.run(ctx)
    assert 0 < sum(len(piece.items) for piece in again[0].pieces) <= 5 * 2 * 12 - 20
    assert timeless(ctx) == timeless(sudoku)
    fault_table.add("the next job decoded only the missing answers", "the same answers")


@pytest.mark.drill
@pytest.mark.faults("a rank of a split model killed", "evaluate")
def test_split_models_give_the_same_rows_although_a_rank_is_lost(
    make_run: Callable[[Recipe], StageContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault_table: FaultTable
) -> None:
    """Models are in fp64: in fp32 residuals amplify the rounding of these random models from pass to pass."""
    whole = make_run(make_recipe(tmp_path))
    for stage in STAGES:
        path = whole.checkpoint(stage)
        load_model(path).double().save_pretrained(path)
    evaluate.run(whole)
    resources = {"evaluate_actors": 1, "tensor_parallel": 2}
    recipe = make_recipe(tmp_path, resources=resources)
    assert stages_of(recipe)["evaluate"].bundles == ({"CPU": 1.0},) * 2
    ctx = stage_context(recipe, "split", whole.inputs)
    monkeypatch.setattr(evaluate, "FLUSH_S", 0.0)
    seconds: list[float] = []

    def kill_a_rank() -> None:
        while num_decoded(ctx) < 20:
            time.sleep(0.01)
        [actor] = [a for a in ray.util.list_named_actors(all_namespaces=True) if a["name"].endswith("-rank-1")]
        ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
        killed, done = time.monotonic(), num_decoded(ctx)
        while num_decoded(ctx) <= done:
            time.sleep(0.1)
        seconds.append(time.monotonic() - killed)

    killer = threading.Thread(target=kill_a_rank, daemon=True)
    killer.start()
    evaluate.run(ctx)
    killer.join(timeout=10)
    assert timeless(ctx) == timeless(whole)
    happened = "a new actor with all of its ranks decoded the missing answers"
    fault_table.add(happened, "the same answers", seconds[0])
