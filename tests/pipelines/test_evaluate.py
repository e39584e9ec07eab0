"""evaluate on real Ray with tiny untrained models: every arm decodes every problem, and the numbers add up."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipelines import evaluate, prepare
from pipelines.config import Recipe, parse_recipe
from pipelines.report import html_report, pareto_plot, print_tables
from pipelines.run import RunDirectory, StageContext
from rcd_core import Decoder, DecodeSettings, load_model, new_model
from rcd_core.families.base import CheckpointInfo
from rcd_core.families.config import ModelConfig
from rcd_core.tasks import get_task
from rcd_core.tokenizer import load_tokenizer, mask_token_id, stop_token_ids

SIZES = {
    "family": "sdar",
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 32,
}
SMALLER = {**SIZES, "hidden_size": 8, "intermediate_size": 16}
TRAIN = {"steps": 1, "batch_size": 1}
STAGES = ("baseline", "target", "target-paper", "reference")


def make_recipe(directory: Path, **sections: Any) -> Recipe:
    raw: dict[str, Any] = {
        "name": "run",
        "storage": str(directory),
        "block_length": 37,
        "tokenizer": {"vocab_size": 270},
        "data": {"task": "sudoku", "train": "synthetic", "test": "synthetic", "num_train": 4, "num_test": 12},
        "base": {"start": SIZES, "train": TRAIN},
        "reference": {"start": SMALLER, "train": TRAIN},
        "target": {"train": TRAIN},
        "variants": {"paper": {"dropout": 0.0}},
        "evaluate": {"thresholds": [0.02, 0.9], "batch_size": 5},
        "resources": {"evaluate_actors": 2},
    }
    return parse_recipe({**raw, **sections})


def stage_context(recipe: Recipe, stage: str, inputs: tuple[str, ...] = ()) -> StageContext:
    console = Console(file=io.StringIO(), width=200)
    run = RunDirectory(recipe.run_directory)
    return StageContext(recipe=recipe, run=run, stage=stage, key="", inputs=inputs, console=console)


@pytest.fixture(scope="module")
def make_run(ray_cluster: str) -> Callable[[Recipe], StageContext]:
    """make_run(recipe): prepare for real, untrained models in place of trained ones -> the context of evaluate."""

    def make(recipe: Recipe) -> StageContext:
        ctx = stage_context(recipe, "prepare")
        _finish(ctx, "prepare", prepare.run(ctx))
        tokenizer = load_tokenizer(f"{ctx.directory}/tokenizer")
        for seed, stage in enumerate(STAGES):
            start = ModelConfig(**(SMALLER if stage == "reference" else SIZES))
            rcd = {} if stage in ("baseline", "reference") else {"alpha": "normalized_entropy", "start": "zero"}
            info = CheckpointInfo(
                mask_token_id(tokenizer), stop_token_ids(tokenizer), tokenizer.pad_token_id, recipe.block_length, rcd
            )
            model = new_model(start, vocab_size=len(tokenizer), info=info, seed=seed)
            for parameter in model.parameters():  # larger than at the start of a training: some confidence
                parameter.data *= 3.0
            model.save_pretrained(Path(recipe.run_directory) / stage / "model", tokenizer)
            _finish(ctx, stage, {})
        return stage_context(recipe, "evaluate", ("prepare", *STAGES))

    def _finish(ctx: StageContext, stage: str, summary: dict[str, Any]) -> None:
        ctx.run.finish(stage, {"stage": stage}, summary, datetime.now().astimezone(), 0.0)

    return make


@pytest.fixture(scope="module")
def sudoku(make_run: Callable[[Recipe], StageContext], tmp_path_factory: pytest.TempPathFactory) -> StageContext:
    ctx = make_run(make_recipe(tmp_path_factory.mktemp("sudoku")))
    evaluate.run(ctx)
    return ctx


def results(ctx: StageContext) -> dict[str, Any]:
    return json.loads((Path(ctx.directory) / "results.json").read_text())  # type: ignore[no-any-return]


def rows(ctx: StageContext) -> list[dict[str, Any]]:
    return pq.read_table(f"{ctx.directory}/results.parquet").to_pylist()  # type: ignore[no-any-return]


def test_every_arm_decodes_every_problem_at_every_threshold(sudoku: StageContext) -> None:
    arms = ["seqd", "target/zero", "target/reference", "target-paper/zero", "target-paper/reference"]
    found = [(row["arm"], row["threshold"], row["example_id"]) for row in rows(sudoku)]
    assert found == [(arm, t, f"{i:08d}") for arm in arms for t in (0.02, 0.9) for i in range(12)]
    assert [arm["name"] for arm in results(sudoku)["arms"]] == arms


def test_rows_are_what_the_decoder_gives_alone(sudoku: StageContext) -> None:
    examples = pq.read_table(f"{sudoku.input_dir('prepare')}/test/part-00000.parquet").to_pylist()
    model, reference = (load_model(sudoku.checkpoint(stage)) for stage in ("target", "reference"))
    settings = DecodeSettings(residual=True, start="reference", confidence_threshold=0.02, seed=0)
    tokenizer = load_tokenizer(f"{sudoku.input_dir('prepare')}/tokenizer")
    mine = [row for row in rows(sudoku) if row["arm"] == "target/reference" and row["threshold"] == 0.02]
    for example, row in zip(examples, mine, strict=True):
        (alone,) = Decoder(model, reference).infill([example["prompt_ids"]], settings)
        text = tokenizer.decode(alone.canvas_ids)
        assert row["completion"] == text
        assert row["correct"] == get_task("sudoku").grade(example["prompt"], str(text), example["answer"])
        assert row["tokens"] == example["prompt_ids"].count(mask_token_id(tokenizer))
        assert (row["denoise"], row["reference"]) == (alone.num_forwards.denoise, 1)
        assert row["reference_weight"] == reference.num_parameters() / model.num_parameters()


def test_results_say_what_was_done(sudoku: StageContext) -> None:
    found = results(sudoku)
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert found["num_problems"] == 12 and found["thresholds"] == [0.02, 0.9]
    assert arms["seqd"]["decode"]["residual"] is False and arms["seqd"]["reference_weight"] == 0
    warm = arms["target/reference"]
    assert warm["decode"]["alpha"] == "normalized_entropy"  # the checkpoint's, filled in
    assert (warm["decode"]["start"], warm["decode"]["seed"], warm["decode"]["block_length"]) == ("reference", 0, 37)
    assert arms["target-paper/zero"]["trained_with"]["dropout"] == 0.0
    point = warm["curve"][1]
    mine = [row for row in rows(sudoku) if row["arm"] == "target/reference" and row["threshold"] == 0.9]
    passes = sum(row["denoise"] + row["reference_weight"] * row["reference"] for row in mine)
    assert point["tokens_per_pass"] == pytest.approx(sum(row["tokens"] for row in mine) / passes)
    assert point["tokens_per_forward"] > point["tokens_per_pass"]
    assert point["mean_reference"] == 1
    assert [c["arm"] for c in found["comparisons"]] == [name for name in arms if name != "seqd"]


def test_batches_and_actors_do_not_change_the_results(sudoku: StageContext) -> None:
    before = rows(sudoku)
    sections = {"evaluate": {"thresholds": [0.9, 0.02], "batch_size": 12}, "resources": {"evaluate_actors": 1}}
    other = make_recipe(Path(sudoku.recipe.storage), **sections)
    evaluate.run(stage_context(other, "evaluate", sudoku.inputs))
    assert rows(sudoku) == before


def test_report_prints_tables_and_where_things_lie(sudoku: StageContext) -> None:
    evaluate.report(sudoku)
    text = sudoku.console.file.getvalue()  # type: ignore[attr-defined]
    assert "RCD, reference start" in text and "12 held-out problems" in text and "not crossed" in text
    for name in ("pareto.png", "report.html", "results.json"):
        assert f"{sudoku.directory}/{name}\n" in text and (Path(sudoku.directory) / name).stat().st_size > 1000
    assert (Path(sudoku.directory) / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_prompts_are_continued_and_without_a_baseline_nothing_is_compared(
    make_run: Callable[[Recipe], StageContext], tmp_path: Path
) -> None:
    recipe = make_recipe(
        tmp_path,
        block_length=8,
        data={"task": "arithmetic", "train": "synthetic", "test": "synthetic", "num_train": 50, "num_test": 6},
        tokenizer={"vocab_size": 330},
        variants={},
        baseline=False,
        evaluate={"num_examples": 5, "thresholds": [0.5], "starts": ["zero"], "decode": {"max_new_tokens": 20}},
    )
    ctx = make_run(recipe)
    summary = evaluate.run(ctx)
    assert summary["num_problems"] == 5 and list(summary["curves"]) == ["target/zero"]
    assert results(ctx)["comparisons"] == []
    for row in rows(ctx):
        assert row["finish_reason"] in ("stop", "length") and 1 <= row["tokens"] <= 20
        assert row["prefill"] == 1 and "<|" not in row["completion"]
    evaluate.report(ctx)
    assert "against SeqD" not in ctx.console.file.getvalue()  # type: ignore[attr-defined]


# -- how results are shown


def shown(ratio: float | None, low: float | None, high: float | None) -> dict[str, Any]:
    """Results of two made-up arms; only the comparison is of interest."""
    point = {"threshold": 0.5, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "tokens_per_pass": 4.0}
    means = {f"mean_{kind}": 1.0 for kind in ("tokens", "denoise", "reference", "prefill", "store")}
    curve = [{**point, **means, "tokens_per_forward": 4.0}]
    arm = {"model": "target", "trained_with": None, "decode": {}, "curve": curve, "start": None}
    return {
        "recipe": "<made up>",
        "task": "sudoku",
        "num_problems": 7,
        "thresholds": [0.5],
        "arms": [
            {**arm, "name": "seqd", "title": "SeqD", "reference_weight": 0.0},
            {**arm, "name": "target/zero", "title": "RCD, zero start", "reference_weight": 0.4},
        ],
        "comparisons": [
            {
                "arm": "target/zero",
                "baseline": "seqd",
                "accuracy_level": 0.9,
                "ratio": {"value": ratio, "low": low, "high": high},
                "gains": [{"tokens_per_pass": 3.0, "difference": {"value": -0.02, "low": -0.05, "high": 0.01}}],
            }
        ],
        "statistics": {},
    }


@pytest.mark.parametrize(("ratio", "says"), [(1.5, "1.50 (1.40 to 1.60) times"), (0.75, "0.75 (0.70 to 0.80) times")])
def test_a_loss_is_told_like_a_win(ratio: float, says: str) -> None:
    found = shown(ratio, round(ratio * 14 / 15, 2), round(ratio * 16 / 15, 2))
    page = html_report(found, b"light", b"dark")
    assert f"RCD, zero start: at 90 % accuracy {says} the tokens per pass of SeqD." in page
    assert "-2.0 (-5.0 to +1.0)" in page and "7 held-out problems" in page and "7 problems" in page
    assert "0.40 of a target pass" in page


def test_what_was_not_reached_gets_no_number() -> None:
    page = html_report(shown(None, None, None), b"", b"")
    assert "do not both cross 90 % accuracy" in page and "not crossed" in page
    console = Console(file=io.StringIO(), width=200)
    print_tables(shown(1.2, None, None), console)
    assert "1.20 (no interval" in console.file.getvalue()  # type: ignore[attr-defined]


def test_page_is_whole_and_escaped() -> None:
    page = html_report(shown(1.0, 0.9, 1.1), b"light", b"dark")
    assert "&lt;made up&gt;" in page and "<made up>" not in page
    assert "http://" not in page and "https://" not in page and 'src="data:image/png' in page
    assert "prefers-color-scheme: dark" in page


def test_equal_results_give_equal_plots() -> None:
    assert pareto_plot(shown(1.0, 0.9, 1.1)) == pareto_plot(shown(1.0, 0.9, 1.1))
    assert pareto_plot(shown(1.0, 0.9, 1.1)) != pareto_plot(shown(1.0, 0.9, 1.1), dark=True)


def test_a_model_without_residuals_in_training_is_decoded_without(tmp_path: Path) -> None:
    """The control `on_policy` stands in the comparison as what it is: no residual, no starts."""
    recipe = make_recipe(tmp_path, variants={"control": {"source": "on_policy"}})
    stages = ("baseline", "target", "target-control", "reference")
    ctx = stage_context(recipe, "evaluate", stages)
    for stage in stages:
        ctx.run.finish(stage, {"stage": stage}, {"checkpoint": f"/{stage}"}, datetime.now().astimezone(), 0.0)
    arms = {arm.name: arm for arm in evaluate._arms(ctx)}
    assert {name for name in arms if "control" in name} == {"target-control"}
    assert not arms["target-control"].settings.residual and arms["target/zero"].settings.residual
