"""What training cost, from the manifests of a run."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pipelines.recipe.load import load_recipe
from pipelines.recipe.model import Recipe
from pipelines.report.costs import beyond_base, by_method, by_stage, training_costs
from pipelines.report.evaluation import html_report
from pipelines.report.markdown import markdown
from pipelines.report.plots import Plot
from pipelines.report.summary import at_a_glance
from pipelines.run.directory import RunDirectory
from rcd_core.io import storage
from tests.pipelines.report.made_results import made

CHUNKS = {"rows": [60, 40], "tokens": [600, 400], "labelled": [300, 200]}  # 10 tokens a row, half of them labelled
CONFIG = {
    "model_type": "sdar", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 4, "intermediate_size": 16, "vocab_size": 20, "tie_word_embeddings": False, "rope_theta": 10000.0,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip
STEPS = {"base": 100, "reference": 50, "target": 30, "baseline": 30}
SECONDS = {"base": 40.0, "reference": 7.0, "signals": 5.0, "target": 20.0, "baseline": 10.0, "calibrate": 3.0}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(str(tmp_path / "sudoku-reference"))
    summaries: dict[str, dict[str, Any]] = {name: {"steps": steps} for name, steps in STEPS.items()}
    summaries |= {"prepare": {"chunks": CHUNKS}, "calibrate": {}, "signals": {"tokens": 1000, "masked_tokens": 250}}
    for name, summary in summaries.items():
        inputs = {"reference": "x"} if name == "signals" else {}
        run.finish(name, {"inputs": inputs}, summary, datetime.now().astimezone(), SECONDS.get(name, 1.0))
        if name in STEPS:
            storage.write_json(storage.join(run.stage_directory(name), "model", "config.json"), CONFIG)
    return run


def recipe(run: RunDirectory, *overrides: str) -> Recipe:
    fewer = ["variants={paper_alpha: null}", "deploy.start=zero"]
    return load_recipe("sudoku-reference", [f"storage={Path(run.path).parent}", *fewer, *overrides])


def costs(run: RunDirectory, *overrides: str) -> dict[str, Any]:
    used = {"seqd": ["baseline"], "target/zero": ["target", "calibrate"]}
    found = training_costs(recipe(run, *overrides), run, used)
    assert found is not None
    return found


def test_figures_by_hand(run: RunDirectory) -> None:
    found = costs(run, "evaluate.starts=[zero]")
    assert found["methods"] == {"seqd": ["base", "baseline"], "target/zero": ["base", "target", "calibrate"]}
    baseline, target = found["stages"]["baseline"], found["stages"]["target"]
    # 30 steps of 64 rows of 10 tokens, each read twice by SDAR's layers; a quarter of the tokens is masked.
    tokens = 30 * 64 * 10
    layer = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8 + 2 * 4
    assert (baseline["tokens"], baseline["seconds"]) == (tokens, 10.0)
    assert baseline["flops"] == pytest.approx(6 * (2 * tokens * layer + tokens / 4 * 20 * 8))
    assert target["flops"] == pytest.approx(baseline["flops"] * (3 + 1.5) / 3), "self-residual runs the model before"


def test_signals_and_their_reference_count_for_a_target_that_trains_on_them(run: RunDirectory) -> None:
    found = costs(run, "target.residual={source: signals}")
    assert found["methods"]["target/zero"] == ["base", "reference", "signals", "target", "calibrate"]
    results = made() | {"costs": found}
    seconds, flops = beyond_base(results, "target/zero") or (0, None)
    assert seconds == 7 + 5 + 20 + 3
    stages = found["stages"]
    assert flops == pytest.approx(sum(stages[name]["flops"] for name in ("reference", "signals", "target")))
    assert stages["signals"]["flops"] > 0 and stages["target"]["flops"] == stages["baseline"]["flops"]


def test_signals_of_an_unchanged_base_and_of_the_target_itself(run: RunDirectory) -> None:
    """The base may be the reference. The target's own, a pass after one over noisier rows, cost twice as much."""
    own = costs(run, "target.residual={source: signals}")["stages"]["signals"]["flops"]
    base = storage.join(run.stage_directory("base"), "model")
    run.finish("reference", {"inputs": {}}, {"checkpoint": base}, datetime.now().astimezone(), 0.1)
    storage.remove(storage.join(run.stage_directory("reference"), "model"))
    for name, maker in (("round-1", ""), ("signals-2", "round-1")):
        summary = {"steps": 15} if name == "round-1" else {"tokens": 1000, "masked_tokens": 250}
        run.finish(name, {"inputs": {maker: "x"} if maker else {}}, summary, datetime.now().astimezone(), 1.0)
    storage.write_json(storage.join(run.stage_directory("round-1"), "model", "config.json"), CONFIG)
    more = ("target.rounds=2", "reference={start: null, train: null}", "signals.on_policy=1.0")
    stages = costs(run, "target.residual={source: signals}", *more)["stages"]
    assert stages["signals"]["flops"] == own > 0 and stages["signals-2"]["flops"] == 2 * own


def test_gains_and_costs_stand_side_by_side(run: RunDirectory) -> None:
    results = made() | {"costs": costs(run)}
    head, rows = at_a_glance(results) or ([], [])
    table = {row[0]: row[1:] for row in rows}
    assert head[1:] == ["RCD, zero start", "SeqD"]
    assert table["training beyond the base, s"] == ["23", "10"]
    advice = results["comparisons"][0]["advice"]
    speeds = [advice[side]["tokens_per_second"] for side in ("arm", "baseline")]
    assert table["wall-clock speed, tokens/s"] == [f"{speed:,.0f}" for speed in speeds]
    assert by_method(results)[1][1][-2:] == ["2.30", "1.50"]
    assert [row[0] for row in by_stage(results)[1]] == ["base", "target", "baseline", "calibrate"]
    page = html_report(results, [{"pareto": Plot(b"light", b"dark")} | {"throughput": Plot(b"light", b"dark")}])
    for shown in (page, markdown(results)):
        assert "Costs of training" in shown and "training beyond the base, s" in shown


def test_checkpoints_from_outside_cost_nothing_that_is_known(run: RunDirectory) -> None:
    for name in STEPS:
        run.finish(name, {"inputs": {}}, {"checkpoint": "/x"}, datetime.now().astimezone(), 0.1)
    assert training_costs(recipe(run), run, {"target/zero": ["target"]}) is None
    assert "Costs of training" not in markdown(made())
