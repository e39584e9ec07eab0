"""The stage evaluate on Ray with tiny untrained models."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data

from pipelines import evaluate
from pipelines.evaluation.actor import DecodeActor, Plan, request_seed
from pipelines.evaluation.shared_engine import SharedEngine
from pipelines.evaluation.thrown_away import thrown_away
from pipelines.ray_cluster import waiting
from pipelines.recipe.model import Recipe
from pipelines.run.directory import StageContext
from pipelines.run.stages import stages_of
from rcd_core import Decoder, DecodeSettings, load_model
from rcd_core.calibration.information import measure
from rcd_core.decoding.engine import Engine
from rcd_core.errors import UserError
from rcd_core.tasks import get_task
from rcd_core.text.tokenizer import load_tokenizer, mask_token_id
from tests.pipelines.evaluate_run import make_recipe, results, rows, stage_context, timeless
from tests.pipelines.evaluate_run import make_run as make_run  # fixtures
from tests.pipelines.evaluate_run import sudoku as sudoku


def test_every_method_decodes_every_problem_at_every_threshold(sudoku: StageContext) -> None:
    arms = ["seqd", "target/zero", "target/reference", "target-paper/zero", "target-paper/reference"]
    decoded = [(row["arm"], row["threshold"], row["example_id"]) for row in rows(sudoku)]
    assert decoded == [(arm, t, f"{i:08d}") for arm in arms for t in (0.02, 0.9) for i in range(12)]
    assert [arm["name"] for arm in results(sudoku)["arms"]] == arms


def test_rows_equal_those_of_the_decoder(sudoku: StageContext) -> None:
    examples = pq.read_table(f"{sudoku.input_dir('prepare')}/test/part-00000.parquet").to_pylist()
    model, reference = (load_model(sudoku.checkpoint(stage)) for stage in ("target", "reference"))
    settings = DecodeSettings(residual=True, start="reference", confidence_threshold=0.02, residual_temperature=1.0)
    tokenizer = load_tokenizer(f"{sudoku.input_dir('prepare')}/tokenizer")
    selected = [row for row in rows(sudoku) if row["arm"] == "target/reference" and row["threshold"] == 0.02]
    for example, row in zip(examples, selected, strict=True):
        (alone,) = Decoder(model, reference).infill([example["prompt_ids"]], settings)
        text = tokenizer.decode(alone.canvas_ids)
        assert row["completion"] == text
        assert row["correct"] == get_task("sudoku").grade(example["prompt"], str(text), example["answer"])
        assert row["tokens"] == example["prompt_ids"].count(mask_token_id(tokenizer))
        assert (row["denoise"], row["reference"]) == (alone.num_forwards.denoise, 1)
        assert row["reference_weight"] == reference.num_parameters() / model.num_parameters()
        assert 0.1 < row["reference_flops_weight"] < row["reference_weight"]


def test_results_have_settings_hardware_and_rates(sudoku: StageContext) -> None:
    made = results(sudoku)
    arms = {arm["name"]: arm for arm in made["arms"]}
    assert made["num_problems"] == 12 and made["thresholds"] == [0.02, 0.9]
    assert arms["seqd"]["decode"]["residual"] is False and arms["seqd"]["reference_weight"] == 0
    assert (made["schema_version"], made["recipe"], made["seed"], made["num_samples"]) == (2, "run", 0, 1)
    (device,) = made["hardware"]["devices"]
    assert device["device"] and device["threads"] == 1 and made["hardware"]["actors"] == 2
    warm = arms["target/reference"]
    assert warm["decode"]["alpha"] == "normalized_entropy"  # from the checkpoint
    assert (warm["decode"]["start"], warm["decode"]["seed"], warm["decode"]["block_length"]) == ("reference", 0, 37)
    assert arms["target-paper/zero"]["trained_with"]["dropout"] == 0.0
    point = warm["curve"][1]
    selected = [row for row in rows(sudoku) if row["arm"] == "target/reference" and row["threshold"] == 0.9]
    passes = sum(row["denoise"] + row["reference_flops_weight"] * row["reference"] for row in selected)
    assert point["tokens_per_pass"] == pytest.approx(sum(row["tokens"] for row in selected) / passes)
    assert point["tokens_per_forward"] > point["tokens_per_pass"]
    assert point["tokens_per_second"] == pytest.approx(
        sum(row["tokens"] for row in selected) / sum(row["seconds"] for row in selected)
    )
    assert point["mean_reference"] == 1
    assert [c["arm"] for c in made["comparisons"]] == [name for name in arms if name != "seqd"]


def test_results_have_what_the_baseline_throws_away(sudoku: StageContext) -> None:
    examples = pq.read_table(f"{sudoku.input_dir('prepare')}/test/part-00000.parquet")
    baseline, settings = load_model(sudoku.checkpoint("baseline")), DecodeSettings(confidence_threshold=0.9, seed=0)
    expected = measure(baseline, examples["prompt_ids"].to_pylist(), settings, infill=True)
    assert results(sudoku)["thrown_away"] == pytest.approx({"prompts": 12, **expected}, rel=1e-6, abs=1e-9)
    assert expected["discarded"] > 0


def test_what_is_thrown_away_is_measured_once_and_not_of_split_models(sudoku: StageContext) -> None:
    ctx = replace(sudoku, stage="elsewhere")
    directory = Path(ctx.directory)
    directory.mkdir()
    plan = evaluate.make_plan(ctx, tuple(evaluate.make_methods(ctx)), set())
    assert thrown_away(ctx, replace(plan, bundles=2 * plan.bundles), "") is None
    assert thrown_away(ctx, replace(plan, methods=plan.methods[1:]), "") is None, "without a baseline"
    (directory / "thrown_away-more.json").write_text('{"prompts": 3}')
    assert thrown_away(ctx, plan, "-more") == {"prompts": 3}
    assert [path.name for path in directory.iterdir()] == ["thrown_away-more.json"]


@pytest.mark.drill
def test_batches_actors_and_waiting_do_not_change_the_results(
    sudoku: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's guard against executions without progress does not end it; a line tells that it waits."""
    sections = {"evaluate": {"thresholds": [0.9, 0.02], "batch_size": 12}, "resources": {"evaluate_actors": 1}}
    other = make_recipe(Path(sudoku.recipe.storage), **sections)
    ctx = stage_context(other, "other-pieces", sudoku.inputs)
    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 0.1)
    monkeypatch.setattr(waiting, "EVERY_S", 0.2)
    evaluate.run(ctx)
    assert timeless(ctx) == timeless(sudoku)
    assert "evaluate: waiting for 12 answers, of up to 1 x (CPU 1)" in ctx.console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("actors", "largest"), [(2, 30), (40, 24), (2000, 1)])
def test_pieces_are_small_and_cover_what_is_left(actors: int, largest: int, sudoku: StageContext) -> None:
    sections: dict[str, Any] = {
        "evaluate": {"thresholds": [0.5, 0.9], "samples": 10, "decode": {"temperature": 1.0}, "batch_size": 256},
        "resources": {"evaluate_actors": actors},
    }
    recipe = make_recipe(Path(sudoku.recipe.storage), **sections)
    ctx = stage_context(recipe, "evaluate", sudoku.inputs)
    methods = tuple(evaluate.make_methods(ctx))
    done = {("seqd", 0.9, item) for item in range(100)}
    plan = evaluate.make_plan(ctx, methods, done)
    left = [(plan.methods[p.method].info.name, p.threshold, item) for p in plan.pieces for item in p.items]
    assert left == [
        (method.info.name, threshold, item)
        for method in methods
        for threshold in (0.9, 0.5)
        for item in range(120)
        if (method.info.name, threshold, item) not in done
    ]
    assert max(len(piece.items) for piece in plan.pieces) == largest
    assert plan.pieces_at_once == -(-256 // largest) + 1, "a full batch and a piece that waits"


def test_report_prints_tables_and_paths(sudoku: StageContext) -> None:
    evaluate.report(sudoku)
    text = sudoku.console.file.getvalue()  # type: ignore[attr-defined]
    assert "RCD, reference start" in text and "12 problems" in text and "not crossed" in text
    for name in ("pareto.png", "report.html", "results.json"):
        assert f"{sudoku.directory}/{name}\n" in text and (Path(sudoku.directory) / name).stat().st_size > 1000
    for name in ("pareto.png", "throughput.png"):
        assert (Path(sudoku.directory) / name).read_bytes().startswith(b"\x89PNG")
    assert (Path(sudoku.directory) / "parts").exists(), "until the manifest stands"


@pytest.mark.drill
def test_several_samples_and_block_lengths(make_run: Callable[[Recipe], StageContext], tmp_path: Path) -> None:
    decode = {"max_new_tokens": 20, "temperature": 1.0}
    recipe = make_recipe(
        tmp_path,
        block_length=8,
        data={"task": "arithmetic", "train": "synthetic", "test": "synthetic", "num_train": 50, "num_test": 6},
        tokenizer={"vocab_size": 330},
        variants={},
        evaluate={
            "num_examples": 5,
            "samples": 3,
            "block_lengths": [8, 4],
            "thresholds": [0.5],
            "starts": ["zero"],
            "decode": decode,
        },  # fmt: skip
    )
    ctx = make_run(recipe)
    summary = evaluate.run(ctx)
    arms = ["seqd/b8", "target/zero/b8", "seqd/b4", "target/zero/b4"]
    assert (summary["num_problems"], summary["num_samples"], list(summary["curves"])) == (5, 3, arms)
    made = results(ctx)
    assert [(c["arm"], c["baseline"]) for c in made["comparisons"]] == [(arms[1], arms[0]), (arms[3], arms[2])]
    assert [arm["decode"]["block_length"] for arm in made["arms"]] == [8, 8, 4, 4]
    assert made["arms"][3]["title"] == "RCD, zero start, block 4"
    for row in rows(ctx):
        assert row["finish_reason"] in ("stop", "length") and 1 <= row["tokens"] <= 20
        assert row["prefill"] == 1 and "<|" not in row["completion"]
    texts = {(row["example_id"], row["sample"]): row["completion"] for row in rows(ctx) if row["arm"] == arms[3]}
    assert len(texts) == len(set(texts.values())) == 15
    examples = pq.read_table(f"{ctx.input_dir('prepare')}/test/part-00000.parquet").to_pylist()
    tokenizer = load_tokenizer(f"{ctx.input_dir('prepare')}/tokenizer")
    seed = request_seed(0, examples[3]["example_id"], 2)
    settings = DecodeSettings(
        residual=True,
        start="zero",
        confidence_threshold=0.5,
        block_length=4,
        seed=seed,
        residual_temperature=1.0,
        **decode,
    )
    (alone,) = Decoder(load_model(ctx.checkpoint("target"))).generate([examples[3]["prompt_ids"]], settings)
    assert texts[examples[3]["example_id"], 2] == tokenizer.decode(alone.token_ids, skip_special_tokens=True)


def test_without_a_baseline_there_is_no_comparison(tmp_path: Path, in_process: list[int], sudoku: StageContext) -> None:
    recipe = sudoku.recipe.model_copy(update={"baseline": False})
    ctx = stage_context(recipe, "alone", sudoku.inputs)
    evaluate.run(ctx)
    assert results(ctx)["comparisons"] == []
    evaluate.report(ctx)
    assert "SeqD" not in ctx.console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"samples": 4}, "evaluate.samples is 4"),
        ({"block_lengths": [8, 8]}, "evaluate.block_lengths is [8, 8]"),
        ({"thresholds": [0.9, 0.5, 0.9]}, "evaluate.thresholds is [0.9, 0.5, 0.9]"),
        ({"block_lengths": [8], "decode": {"block_length": 8}}, "evaluate.decode.block_length"),
        ({"block_lengths": [8, 4], "decode": {"denoising_steps": 8}}, "denoising_steps is 8"),
    ],
)
def test_contradicting_settings_are_refused(section: Any, key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(key)):
        make_recipe(tmp_path, evaluate=section)
    make_recipe(tmp_path, evaluate={"samples": 4, "decode": {"temperature": 0.6}, "block_lengths": [8, 4]})


# -- interrupted and resumed


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Decodes in this process instead of in Ray, and writes every answer at once. Returns the batch sizes decoded."""
    batches: list[int] = []

    def decode(ctx: StageContext, plan: Plan) -> None:
        actor = DecodeActor(plan)
        for number in range(len(plan.pieces)):
            actor(pa.table({"id": [number]}))

    finished = SharedEngine.finished

    def counted(self: SharedEngine, requests: Any) -> Any:
        batches.append(len(requests))
        return finished(self, requests)

    monkeypatch.setattr(evaluate, "_decode", decode)
    monkeypatch.setattr(evaluate, "FLUSH_S", 0.0)
    monkeypatch.setattr(SharedEngine, "finished", counted)
    return batches


def test_an_interrupted_evaluation_decodes_the_missing_answers_only(
    sudoku: StageContext, in_process: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = stage_context(sudoku.recipe, "interrupted", sudoku.inputs)
    graded = 0

    def grade(*args: Any) -> bool:
        nonlocal graded
        graded += 1
        if graded == 30:  # within a shard
            raise KeyboardInterrupt
        return type(task).grade(task, *args)

    task = get_task("sudoku")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(task, "grade", grade, raising=False)
        evaluate.run(ctx)
    assert not (Path(ctx.directory) / "results.parquet").exists()
    in_process.clear()
    evaluate.run(ctx)
    assert sum(in_process) == 5 * 2 * 12 - 29
    assert timeless(ctx) == timeless(sudoku)
    assert "29 answers are already decoded" in ctx.console.file.getvalue()  # type: ignore[attr-defined]
    in_process.clear()
    evaluate.run(ctx)  # as after a kill before the manifest
    assert not any(in_process)
    assert stages_of(ctx.recipe)["evaluate"].temporary == ("parts",)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_failed_pass_is_tried_once_more_with_a_new_engine(
    failures: int, sudoku: StageContext, in_process: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = stage_context(sudoku.recipe, f"failed-{failures}", sudoku.inputs)
    steps, step = 0, Engine.step

    def failing(self: Engine) -> Any:
        nonlocal steps
        steps += 1
        if 20 < steps <= 20 + failures:
            raise RuntimeError("a pass that fails")
        return step(self)

    monkeypatch.setattr(Engine, "step", failing)
    if failures == 1:
        evaluate.run(ctx)
        assert timeless(ctx) == timeless(sudoku)
    else:
        with pytest.raises(RuntimeError, match="a pass that fails"):
            evaluate.run(ctx)


def test_a_model_trained_without_residuals_is_decoded_without(tmp_path: Path) -> None:
    """The control `on_policy` has no residual, and so no starts."""
    recipe = make_recipe(tmp_path, variants={"control": {"source": "on_policy"}})
    stages = ("baseline", "target", "target-control", "reference")
    ctx = stage_context(recipe, "evaluate", stages)
    for stage in stages:
        ctx.run.finish(stage, {"stage": stage}, {"checkpoint": f"/{stage}"}, datetime.now().astimezone(), 0.0)
    methods = {method.info.name: method for method in evaluate.make_methods(ctx)}
    assert {name for name in methods if "control" in name} == {"target-control"}
    assert not methods["target-control"].settings.residual and methods["target/zero"].settings.residual
