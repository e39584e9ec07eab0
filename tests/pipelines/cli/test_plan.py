"""`rcd plan`, `rcd train plan` and `rcd signals plan`, with the recipes of published sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.cli.main import main, make_app
from pipelines.cli.plan import device_time, known_config
from pipelines.recipe.files import recipe_names
from pipelines.recipe.load import load_recipe
from pipelines.run.driver import main as full
from pipelines.signals.costs import Volume, column_bytes, costs, volume
from pipelines.signals.plan import predicted_bytes
from rcd_core import load_model
from rcd_core.errors import UserError
from tests.rcd_core.families.test_official_layouts import LLADA_CONFIG, SDAR_SIZES, sdar_config

GOLDEN = Path(__file__).parents[2] / "golden"
SIZES = "family: sdar, num_heads: 32, num_kv_heads: 8, head_dim: 128, num_layers: 36"
SDAR_8B = f"target.start={{{SIZES}, hidden_size: 4096, intermediate_size: 12288}}"
SDAR_4B = f"reference.start={{{SIZES}, hidden_size: 2560, intermediate_size: 9728}}"
PUBLISHED = [name for name in recipe_names() if name.startswith(("sdar", "llada"))]


def plan_signals(*arguments: str) -> int:
    return int(make_app()(["signals", "plan", *arguments], exit_on_error=False, print_error=False))


def plan(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["train", "plan", *arguments]) == code
    caught = capsys.readouterr()
    return caught.err if code else caught.out


def test_a_plan_of_a_published_size(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    sizes = ["--vocab_size", "151936", "--set", SDAR_8B, "--set", SDAR_4B]
    out = plan(capsys, "--recipe", "sdar-8b-b64", *sizes, "--examples", "960", "--example_tokens", "4000")
    assert "target: 8,190,735,360 parameters" in out and "reference: 4,411,424,256 parameters" in out
    assert "50 steps of 96: 19,200,000 tokens (given)" in out, "5 epochs of 960 examples"
    rows = {line.split("│")[1].strip(): line for line in out[out.index("target:") :].splitlines() if "│" in line}
    assert "no" in rows["ddp"] and "none" in rows["ddp"] and "yes" in rows["recipe: fsdp2"]
    assert float(rows["deepspeed 3"].split("│")[8]) < float(rows["deepspeed 1"].split("│")[8])
    unknown = plan(capsys, "--recipe", "sdar-8b-b64", *sizes)
    assert "5 epochs" in unknown and "--examples" in unknown


def overview(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[str]]:
    """Stage -> the cells of its row."""
    assert main(["plan", *arguments]) == 0
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 5}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "smoke" not in name])  # which has few steps
def test_one_table_plans_every_published_recipe(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the sizes in the package: without a cache of the hub, and without a recipe's run."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    rows = overview(capsys, "--recipe", name, "--examples", "100000", "--example-tokens", "3000", "--gpus", "16")
    assert list(rows) == ["reference", "signals", "target", "baseline", "all"]
    hours = {stage: float(cells[2].replace(",", "")) for stage, cells in rows.items()}
    assert hours["all"] == pytest.approx(sum(hours.values()) - hours["all"], rel=0.02)
    assert hours["target"] == hours["baseline"] > hours["signals"] > 0
    assert rows["target"][1].endswith(("minutes", "hours", "days")) and "GB checkpoints" in rows["target"][-1]


def test_the_table_and_the_single_plans_agree(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    counted = ["--recipe", "sdar-4b-b32", "--examples", "100000", "--example_tokens", "3008"]
    rows = overview(capsys, *counted)
    single = plan(capsys, *counted)
    assert f"{rows['target'][1]} on 8 x H100" in single[single.index("target:") :]
    assert plan_signals(*counted) == 0
    hours = float(rows["signals"][2])
    assert f"= {hours:.1f} hours on one device" in capsys.readouterr().out


def test_a_small_recipe_with_variants(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rows = overview(capsys, "--recipe", "sudoku-reference", "--set", f"storage={tmp_path}")
    assert {"base", "target-paper_alpha", "baseline"} <= set(rows) and rows["target"][1] == "under 1 s"
    assert main(["plan", "--recipe", "sdar-4b-b32"]) == 2
    assert "--examples" in capsys.readouterr().err


def test_sizes_come_from_a_checkpoint_on_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny = str(GOLDEN / "sdar_tiny")
    sets = ["base=null", f"target.start={tiny}", f"tokenizer.path={tiny}", f"storage={tmp_path}"]
    arguments = [part for s in sets for part in ("--set", s)]
    out = plan(capsys, "--recipe", "sudoku-reference", "--vocab_size", "300", *arguments)
    assert f"target: {load_model(tiny).num_parameters():,} parameters" in out


def test_a_plan_that_lacks_sizes_names_the_key_and_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    refused = plan(capsys, "--recipe", "sdar-8b-b64", "--set", "reference.start=owner/small", code=2)
    assert "reference.start is owner/small" in refused
    assert "hf download owner/small config.json" in refused
    assert "--vocab_size" in plan(capsys, "--recipe", "sdar-8b-b64", "--set", SDAR_4B, code=2)
    assert "--mfu is 4.0" in plan(capsys, "--recipe", "sudoku-reference", "--mfu", "4", code=2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_of_published_sizes_dry_run(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert full(["--recipe", name, "--storage", str(tmp_path), "--dry-run"]) == 0
    assert "8 x (CPU 8, GPU 1)" in capsys.readouterr().out
    recipe = load_recipe(name)
    assert recipe.target.residual.dropout == 0 and recipe.target.residual.alpha == "normalized_entropy"
    assert not any(tmp_path.iterdir()), "nothing is written"


# -- rcd signals plan

VOLUME = Volume(100, 400, 4000, 1500, 12_000, 300, exact=True)


def test_costs_by_hand() -> None:
    """Reference 10 and target 30 parameters, [noisy | clean], a device of 1 FLOP/s."""
    found = costs(VOLUME, 2, 10, 30, 1.0, storage_hours=0.0)
    assert found.reference_hours == pytest.approx(2 * 10 * 2 * 4000 / 3600)
    assert found.online_hours == pytest.approx(3 * found.reference_hours), "three epochs over each cached row"
    assert found.online_hours / found.target_hours == pytest.approx(2 * 10 / (6 * 30))
    assert found.break_even == pytest.approx(1 / 3)
    dearer = costs(VOLUME, 2, 10, 30, 1.0, storage_hours=found.online_hours)
    assert dearer.break_even == pytest.approx(4 / 3)


def test_columns_add_up_to_what_the_shards_are_planned_by() -> None:
    total = sum(column_bytes(VOLUME, 32).values())
    planned = predicted_bytes(VOLUME.rows, VOLUME.tokens, 2 * VOLUME.masked, vocab_size=300, top_k=32)
    assert total == pytest.approx(planned, abs=1)
    assert sum(column_bytes(replace(VOLUME, masked=0), 32).values()) < total


def test_plan_before_and_after_prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Limits of the recipe first, the counts of prepare's manifest once there is one."""
    recipe = load_recipe("sudoku-reference", [f"storage={tmp_path}"])
    limits = volume(recipe)
    assert not limits.exact and limits.tokens == limits.rows * recipe.data.max_length
    assert plan_signals("--recipe", "sudoku-reference", "--set", f"storage={tmp_path}", "--storage-hours", "1e-6") == 0
    shown = capsys.readouterr().out
    assert f"rows {limits.rows:,}" in shown and "at most, by the recipe's limits" in shown and "break-even" in shown

    chunks = {"file": [0, 0], "rows": [60, 40], "tokens": [600, 400], "labelled": [300, 100]}
    directory = tmp_path / "sudoku-reference" / "prepare"
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text(
        json.dumps({"schema": 2, "key": "k", "summary": {"chunks": chunks, "vocab_size": 271}})
    )
    counted = volume(recipe)
    rows = 100 * recipe.noise.draws
    assert counted.exact and (counted.rows, counted.tokens, counted.vocab_size) == (rows, 10 * rows, 271)
    assert counted.masked == round(4 * rows * (1 + recipe.noise.eps) / 2)
    train = recipe.target.train
    assert counted.trained_tokens == 10 * train.steps * train.batch_size


@pytest.mark.parametrize("recipe", ["sdar-8b-b64", "sdar-4b-b64", "llada-8b"])
def test_the_papers_recipes_plan_without_the_hub(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From sizes that ship with the package, which are those of the released layouts."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    flags = ["--recipe", recipe, "--set", f"storage={tmp_path}", "--examples", "1000", "--example_tokens", "900"]
    assert main(["train", "plan", *flags]) == 0
    shown = capsys.readouterr().out
    wanted = {"sdar-8b-b64": "8,190,735,360", "sdar-4b-b64": "4,411,424,256", "llada-8b": "8,015,581,184"}
    assert f"target: {wanted[recipe]} parameters" in shown


def test_shipped_sizes_are_the_released_ones() -> None:
    for name, (hidden, layers, heads, inner) in SDAR_SIZES.items():
        config = known_config(f"JetLM/{name}")
        assert config is not None
        assert (config["hidden_size"], config["num_hidden_layers"]) == (hidden, layers)
        assert (config["num_attention_heads"], config["intermediate_size"]) == (heads, inner)
        assert {k: v for k, v in config.items() if sdar_config(name)[k] != v} == {}
    llada = known_config("GSAI-ML/LLaDA-8B-Instruct")
    assert llada is not None and {k: v for k, v in llada.items() if LLADA_CONFIG[k] != v} == {}
    assert known_config("owner/other") is None


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (2.71e-7, "0.00098 s"),
        (0.005, "18 s"),
        (0.04, "2.4 minutes"),
        (5.25, "5.2 hours"),
        (1200.0, "50.0 days"),
        (0, "0 s"),
    ],
)
def test_device_times_are_in_units_of_their_size(hours: float, text: str) -> None:
    assert device_time(hours) == text


def test_a_plan_that_lacks_counts_names_the_key(tmp_path: Path) -> None:
    here = f"storage={tmp_path}"
    with pytest.raises(UserError, match="data.num_train is null"):
        volume(load_recipe("gsm8k", [here, "data.train=/x.jsonl", "data.test=/x.jsonl"]))
    with pytest.raises(UserError, match="tokenizer.path"):
        volume(load_recipe("sudoku-reference", [here, f"tokenizer.path={GOLDEN / 'sdar_tiny'}"]))
    with pytest.raises(UserError, match="--mfu is 0"):
        plan_signals("--recipe", "sudoku-reference", "--set", here, "--mfu", "0")
    with pytest.raises(UserError, match="--storage_hours is -3"):
        plan_signals("--recipe", "sudoku-reference", "--set", here, "--storage_hours", "-3")
    assert main(["plan", "--recipe", "demo", "--examples", "100", "--example_tokens", "nan"]) == 2
