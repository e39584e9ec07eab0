"""`rcd report` on made-up results: grouping of runs, means over seeds, and the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.cli.main import main
from pipelines.evaluation.actor import ROWS
from pipelines.evaluation.results import analyse
from pipelines.recipe.load import dump_recipe, load_recipe
from pipelines.report.comparison import (
    Group,
    Run,
    differences,
    group_runs,
    load_runs,
    mean_curve,
    mean_sd,
    method_table,
)
from pipelines.report.comparison_page import html
from rcd_core import UserError
from rcd_core.io import storage
from tests.pipelines.report.made_results import info
from tests.s3_server import s3_server

THRESHOLDS = (0.6, 0.8, 0.95)
# Correct answers of 40 problems, and passes per problem of 24 tokens, by method and threshold.
MADE = {"seqd": ((10, 30, 39), (4, 8, 12)), "target/zero": ((12, 30, 39), (3, 5, 8))}


def results(seed: int = 0, better: int = 0, **changes: Any) -> Any:
    """results.json; better: additional correct answers of the target."""
    rows = [
        {
            "arm": name, "threshold": threshold, "example_id": f"{i:02d}", "sample": 0,
            "correct": i < correct + better * (name != "seqd"), "tokens": 24, "denoise": passes,
            "reference": 0, "prefill": 0, "store": 0, "reference_weight": 0.0, "reference_flops_weight": 0.0,
            "seconds": 0.01, "finish_reason": "filled", "completion": "",
        }
        for name, columns in MADE.items()
        for threshold, correct, passes in zip(THRESHOLDS, *columns, strict=True)
        for i in range(40)
    ]  # fmt: skip
    made = analyse(
        recipe="demo",
        task="sudoku",
        seed=seed,
        methods=[info("seqd", "SeqD"), info("target/zero", "RCD, zero start")],
        table=pa.Table.from_pylist(rows, schema=ROWS),
        settings={name: {"seed": seed, "residual": name != "seqd"} for name in MADE},
        accuracy_levels=(0.7,),
        hardware={},
    )
    return made | changes


def write(directory: str | Path, made: Any, *overrides: str) -> str:
    directory = str(directory)
    if overrides:
        recipe = dump_recipe(load_recipe("demo", [*overrides, f"seed={made['seed']}", "storage=/runs"]))
        storage.write_bytes(storage.join(directory, "recipe.yaml"), recipe.encode())
    storage.write_json(storage.join(directory, "evaluate", "results.json"), made)
    return directory


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """A recipe under three seeds, and another recipe."""
    demo = {
        seed: write(
            tmp_path / f"demo-s{seed}", results(seed, better), f"name=demo-s{seed}", f"resources.num_workers={n}"
        )
        for seed, better, n in ((2, 0, 4), (0, 1, 1), (1, 2, 2))
    }
    other = write(tmp_path / "sparse", results(better=-2), "name=sparse", "signals.top_k=4")
    return [demo[2], demo[0], other, demo[1]]


def test_seeds_names_and_resources_do_not_split_a_group(runs: list[str]) -> None:
    groups = group_runs(load_runs(runs))
    assert [group.label for group in groups] == ["demo", "sparse"]
    assert [run.results["seed"] for run in groups[0].runs] == [0, 1, 2]
    assert differences(groups) == (["key", "demo", "sparse"], [["signals.top_k", "32", "4"]])


def test_a_method_has_a_row_per_seed_and_one_of_means(runs: list[str]) -> None:
    groups = group_runs(load_runs(runs))
    head, rows = method_table(groups, "target/zero")
    assert head == ["run", "seed", "ratio at 70 %", "ratio at the baseline's best", "AUP", "0.6", "0.8", "0.95"]
    assert [" ".join(row[:2]) for row in rows] == ["demo 0", "demo 1", "demo 2", "demo mean ± SD", "sparse 0"]
    cells = ["32.5 @ 8.00", "35.0 @ 8.00", "30.0 @ 8.00", "32.5 ± 2.5\n@ 8.00 ± 0.00", "25.0 @ 8.00"]
    assert [row[5] for row in rows] == cells
    ratios = [run.ratios("target/zero")["ratio at 70 %"]["value"] for run in groups[0].runs]
    assert rows[3][2] == f"{fmean(ratios):.2f} ± {stdev(ratios):.2f}" and ratios[0] != ratios[1]
    level = next(c for c in groups[1].runs[0].results["comparisons"])["tokens_per_pass"]["levels"][0]
    assert rows[4][2].startswith(f"{level['ratio']['value']:.2f} ({level['ratio']['low']:.2f} to ")
    baseline = method_table(groups, "seqd")
    assert baseline[0][:3] == ["run", "seed", "AUP"]


def test_a_mean_over_some_of_the_seeds_says_how_many(tmp_path: Path) -> None:
    made = results(1)
    made["comparisons"][0]["tokens_per_pass"]["levels"][0]["ratio"] = {"value": None, "low": None, "high": None}
    paths = [write(tmp_path / "a-0", results(0), "name=a-0"), write(tmp_path / "a-1", made, "name=a-1")]
    groups = group_runs(load_runs(paths))
    rows = method_table(groups, "target/zero")[1]
    assert rows[1][2] == "not crossed" and rows[2][2].endswith("(1 of 2 seeds)")


def test_runs_without_a_recipe_are_grouped_by_decoding_settings(tmp_path: Path) -> None:
    """Such runs come from an endpoint; they may lack rates."""
    first, second, other = results(0), results(1), results(2)
    other["arms"][1]["decode"]["alpha"] = "one"
    for point in other["arms"][1]["curve"]:
        point["tokens_per_pass"] = None
    del other["arms"][1]["aup"]
    for name, made in (("x0", first), ("x1", second), ("y", other)):
        storage.write_json(str(tmp_path / name / "results.json"), made)
    groups = group_runs(load_runs([str(tmp_path / name) for name in ("x0", "x1", "y")]))
    assert [(group.label, len(group.runs)) for group in groups] == [("x", 2), ("y", 1)]
    assert differences(groups)[1] == [["decode.target/zero.alpha", "absent", '"one"']]
    assert method_table(groups, "target/zero")[1][-1][-3] == "30.0 @ not reported"
    assert mean_curve(groups[1].runs, "target/zero") == [] and len(mean_curve(groups[1].runs, "seqd")) == 3


def test_error_bars_are_the_deviation_of_seeds_or_the_interval_of_a_run(runs: list[str]) -> None:
    demo, sparse = group_runs(load_runs(runs))
    point = mean_curve(demo.runs, "target/zero")[0]
    assert (point.rate, point.accuracy, *point.bar) == pytest.approx((8.0, 32.5, 2.5, 2.5))
    alone, made = mean_curve(sparse.runs, "target/zero")[0], sparse.runs[0].results["arms"][1]["curve"][0]
    assert alone.accuracy - alone.bar[0] == pytest.approx(100 * made["accuracy_low"])
    assert alone.accuracy + alone.bar[1] == pytest.approx(100 * made["accuracy_high"])
    mean, sd = mean_sd([1.0, 2.0, 6.0])
    assert (mean, sd) == pytest.approx((3.0, np.std([1, 2, 6], ddof=1)))
    assert math.isnan(mean_sd([1.0])[1]) and math.isnan(mean_sd([])[0])


def test_the_command_prints_and_writes_one_page(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    page = tmp_path / "out" / "page.html"
    assert main(["report", *runs, "--output", str(page), "--arms", "target/*"]) == 0
    printed = capsys.readouterr().out
    assert "32.5 ± 2.5" in printed and "signals.top_k" in printed and "SeqD" not in printed
    content = page.read_text()
    assert content.count("data:image/png;base64,") == 4 and "demo (3 seeds), sparse" in content
    assert ">RCD, zero start</h2>" in content and "signals.top_k" in content
    assert "http://" not in content and "https://" not in content


def test_error_bars_end_at_0_and_100_percent() -> None:
    made = [results(seed=seed) for seed in (0, 1)]
    for run, accuracy in zip(made, (1.0, 0.9), strict=True):
        run["arms"][0]["curve"][0]["accuracy"] = accuracy
    threshold = made[0]["arms"][0]["curve"][0]["threshold"]
    runs = [Run(f"r{i}", one, {}) for i, one in enumerate(made)]
    points = {p["threshold"]: i for i, p in enumerate(made[0]["arms"][0]["curve"])}
    point = mean_curve(runs, made[0]["arms"][0]["name"])[sorted(points).index(threshold)]
    assert point.accuracy == pytest.approx(95) and point.bar == pytest.approx((7.071, 5.0), abs=0.01)


def test_names_on_the_page_are_escaped() -> None:
    made = results()
    made["arms"][1]["title"] = "<script>title"
    group = Group("<script>label", (Run("run", made, {"key": "<script>value"}),))
    page = html([group, Group("other", (Run("other", made, {}),))], {"target/zero": "<script>title"})
    assert "<script" not in page
    assert all(f"&lt;script&gt;{name}" in page for name in ("title", "label", "value"))


def test_runs_that_cannot_be_compared_cause_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [
        write(tmp_path / "a", results(), "name=a"),
        write(tmp_path / "b", results(task="arithmetic"), "name=b", "data.task=arithmetic"),
    ]
    assert main(["report", *paths]) == 0
    assert "different tasks (a: sudoku, b: arithmetic)" in " ".join(capsys.readouterr().out.split())
    again = write(tmp_path / "again", results(), "name=again")
    assert main(["report", paths[0], again]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "a and again have the same recipe and the same seed, 0" in printed


def test_mistakes_are_named(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        load_runs([str(tmp_path / "empty")])
    with pytest.raises(UserError, match=runs[0]):
        load_runs([runs[0], runs[0] + "/"])
    with pytest.raises(UserError, match="schema_version"):
        load_runs([write(tmp_path / "old", results(schema_version=1))])
    assert main(["report", runs[0], "--arms", "target/warm"]) == 2
    assert "no run has a method 'target/warm'; they have seqd, target/zero" in capsys.readouterr().err


def test_labels_are_as_long_as_needed(tmp_path: Path) -> None:
    paths = [write(tmp_path / where / "demo", results(seed), "name=demo") for seed, where in ((0, "x"), (1, "y"))]
    assert [run.label for run in load_runs(paths)] == ["x/demo", "y/demo"]


@pytest.mark.drill
def test_runs_on_object_storage(runs: list[str]) -> None:
    with s3_server("bucket"):
        far = write("s3://bucket/far", json.loads(Path(runs[2], "evaluate", "results.json").read_text()), "name=far")
        assert main(["report", far, runs[0], "--output", "s3://bucket/page.html"]) == 0
        assert b"<p>far (2 seeds); task sudoku.</p>" in storage.read_bytes("s3://bucket/page.html")
