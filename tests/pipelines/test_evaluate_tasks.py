"""Several tasks in one evaluation, on Ray with tiny untrained models."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines import evaluate, prepare
from pipelines.recipe.model import Recipe
from pipelines.run.directory import StageContext
from pipelines.run.stages import stages_of
from rcd_core.errors import UserError
from rcd_core.tasks import get_task
from tests.pipelines.evaluate_run import STAGES, make_recipe, results, rows, stage_context
from tests.pipelines.evaluate_run import make_run as make_run  # fixture

SUMS = {"task": "arithmetic", "num_test": 4, "max_length": 300, "thresholds": [0.5], "decode": {"max_new_tokens": 16}}


def test_every_task_has_its_own_problems_settings_and_verdict(
    make_run: Callable[[Recipe], StageContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"thresholds": [0.9, 0.5], "batch_size": 12, "starts": ["zero"], "tasks": {"sums": SUMS}}
    recipe = make_recipe(tmp_path, evaluate=section)
    make_run(recipe)
    made = stage_context(recipe, "prepare-sums", stages_of(recipe)["prepare-sums"].inputs)
    summary = prepare.run_task(made)
    made.run.finish(made.stage, {}, summary, datetime.now().astimezone(), 0.0)
    assert summary["counts"]["test"]["examples"] == 4

    ctx = stage_context(recipe, "evaluate", ("prepare", "prepare-sums", *STAGES))
    manifest = evaluate.run(ctx)
    assert manifest["num_problems"] == 12 and manifest["tasks"]["sums"]["num_problems"] == 4
    arms = ["seqd", "target/zero", "target-paper/zero"]
    decoded = pq.read_table(f"{ctx.directory}/results-sums.parquet").to_pylist()
    assert [(row["arm"], row["example_id"]) for row in decoded] == [(arm, f"{i:08d}") for arm in arms for i in range(4)]
    assert {row["threshold"] for row in decoded} == {0.5} and max(row["tokens"] for row in decoded) <= 16
    assert {row["threshold"] for row in rows(ctx)} == {0.5, 0.9} and len(rows(ctx)) == 3 * 2 * 12
    examples = {e["example_id"]: e for e in pq.read_table(f"{made.directory}/test/part-00000.parquet").to_pylist()}
    task = get_task("arithmetic")
    for row in decoded:
        example = examples[row["example_id"]]
        assert row["correct"] == task.grade(example["prompt"], row["completion"], example["answer"])

    both = results(ctx)
    sums = both["tasks"]["sums"]
    assert (both["task"], sums["task"]) == ("sudoku", "arithmetic") and "tasks" not in sums
    assert [arm["decode"]["max_new_tokens"] for arm in sums["arms"]] == [16] * 3
    assert sums["examples"]["problems"][0]["prompt"] == examples["00000000"]["prompt"]
    page, text = ((Path(ctx.directory) / f"report.{kind}").read_text() for kind in ("html", "md"))
    for shown in (page, text):
        assert shown.count("No model solves this task") == 2
        assert "Task sums" in shown and examples["00000000"]["prompt"][:40] in shown
    assert (Path(ctx.directory) / "pareto-sums.png").exists()
    evaluate.report(ctx)
    assert "arithmetic, 4 problems" in ctx.console.file.getvalue()  # type: ignore[attr-defined]

    def refuse(*args: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(evaluate, "_run_actors", refuse)
    assert evaluate.run(ctx) == manifest, "as after a kill before the manifest: nothing is decoded again"
    assert stages_of(recipe)["evaluate"].temporary == ("parts", "parts-sums")


def test_too_short_a_limit_names_the_key_of_the_task(ray_cluster: str, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, evaluate={"thresholds": [0.9], "tasks": {"sums": {**SUMS, "max_length": 8}}})
    ctx = stage_context(recipe, "prepare")
    ctx.run.finish("prepare", {}, prepare.run(ctx), datetime.now().astimezone(), 0.0)
    key = r"evaluate\.tasks\.sums"
    with pytest.raises(UserError, match=rf"{key}\.test: 4 of 4 rows .* {key}\.max_length"):
        prepare.run_task(stage_context(recipe, "prepare-sums", ("prepare",)))
